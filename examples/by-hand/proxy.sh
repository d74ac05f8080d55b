#!/bin/sh
# Steps 1 and 2: the proxy container, with a route of its own to the metadata service.
#
#   ./proxy.sh [argument of docker run...]
set -eu
exec docker run --detach --name imds-proxy --label MSIProxyContainer \
  --user 0:0 --cap-drop ALL --cap-add NET_ADMIN "$@" \
  "${IMDSGATE_IMAGE:-imdsgate}" proxy --listen :80 --ensure-route
