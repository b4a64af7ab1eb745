#!/usr/bin/env bash
# Trains as on several hosts, on one machine: each host is a network namespace of its own, and all hang on one switch.
# Needs root, iproute2 and bash.
#
#   benchmarks/namespaces.sh HOSTS RANKS [key=value | --overwrite …]
#
# starts RANKS processes on each of HOSTS hosts, by the very commands of docs/scaling.md, and ends with the status of
# the training run, or 77 where namespaces are not permitted. The hosts share the disk. PYTHON names the interpreter.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
hosts=$1 ranks=$2
shift 2
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
name=mrpo-$$
folder=$(mktemp -d)
pids=()

clean_up() {
    for pid in "${pids[@]}"; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for host in $(seq 0 $((hosts - 1))) switch; do
        ip netns pids "$name-$host" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns del "$name-$host" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 143' TERM INT

wire() {  # one end of a cable in the host, the other in the switch
    local host=$1
    ip netns add "$name-$host"
    ip -n "$name-switch" link add "port$host" type veth peer name eth0 netns "$name-$host"
    ip -n "$name-switch" link set "port$host" master switch up
    ip -n "$name-$host" addr add "10.77.0.$((host + 1))/24" dev eth0
    ip -n "$name-$host" link set eth0 up
    ip -n "$name-$host" link set lo up
}

# A function under `||` would run on past its errors: a shell of its own does not.
lay_out() (
    set -e
    ip netns add "$name-switch"
    ip -n "$name-switch" link add switch type bridge
    ip -n "$name-switch" link set switch up
    for host in $(seq 0 $((hosts - 1))); do wire "$host"; done
)
set +e
lay_out
laid_out=$?
set -e
if [ $laid_out -ne 0 ]; then
    echo "this machine does not permit network namespaces" >&2
    exit 77
fi

for host in $(seq 0 $((hosts - 1))); do
    echo "10.77.0.$((host + 1)) slots=$ranks" >>"$folder/hostfile"
done
for host in $(seq 0 $((hosts - 1))); do
    ip netns exec "$name-$host" env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0 \
        "$python" -m deepspeed.launcher.runner --hostfile "$folder/hostfile" --no_ssh --node_rank "$host" \
        --master_addr 10.77.0.1 --master_port 29500 "$root/mrpo/train.py" "$@" &
    pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit "$status"
