#!/bin/bash
# Hand a job to a cluster that runs, from any machine that has its token:
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 bash job_submit.sh /shared/search.toml
# The command runs on the cluster, goes on when this terminal closes, and is seen there by
# ray job status|logs|stop. Needs pip install 'ray[default]' here and on the head.
set -euo pipefail
: "${RAY_API_SERVER_ADDRESS:?set it to the address of the dashboard, such as http://HEAD:8265}"

# The same token as on the nodes: ~/.ray/auth_token, or RAY_AUTH_TOKEN. It travels unencrypted, so
# reach the head through an encrypted network or ssh -L 8265:localhost:8265 HEAD.
export RAY_AUTH_MODE=token

ray job submit --no-wait --entrypoint-num-cpus 1 -- nas cluster "$@" --ray auto
