package main

// honesty is what the help says of Windows, and the README too.
const honesty = `
Windows support: the relay, discovery, service and read-only network code are
executed in CI on Wine 8; code that changes Windows networking (addresses, routes,
HNS policies) is compiled, vetted and tested against fakes, and has not been run
on Windows. The 2018 experiment is the only field evidence for the alias method
(Server 1709, NAT) and for the proxy policy (pre-release RS4, l2bridge).`
