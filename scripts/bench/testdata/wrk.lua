-- What each request has, and the result of the run as one line of JSON. All
-- services are asked in the same words; with "close" each request has a
-- connection of its own.
wrk.headers["Metadata"] = "true"
wrk.headers["Host"] = "169.254.169.254"

function init(args)
  if args[1] == "close" then
    wrk.headers["Connection"] = "close"
  end
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"us":%d,"p50":%d,"p99":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect, e.read, e.write, e.status, e.timeout))
end
