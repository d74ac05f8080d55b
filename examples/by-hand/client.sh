#!/bin/sh
# Steps 3, 4 and 5: find the proxy, and run a client whose metadata calls go to it.
#
#   ./client.sh IMAGE COMMAND [ARGUMENT...]
set -eu
image=$1
shift
IMSProxyIpAddress=$(imdsgate locate --wait 10s)
export IMSProxyIpAddress
exec docker run --rm --user 0:0 -e IMSProxyIpAddress --cap-add NET_ADMIN \
  -v "$(command -v imdsgate):/usr/local/bin/imdsgate:ro" \
  "$image" imdsgate forward -- "$@"
