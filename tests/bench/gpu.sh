#!/usr/bin/env bash
# A quarter of an hour of one GPU in one command: tests, benchmarks, then cells of CIFAR-10.
#
#   tests/bench/gpu.sh OUT [CARRIED]
#
# OUT gets every result as soon as it is there: `tests.log`, the benchmarks' JSON, `study.tar.gz` after
# each look at the study, `job.log`. CARRIED is a folder with what a bare machine lacks, each part
# optional: `wheels/*.whl` (put on PYTHONPATH, without their needs), `cifar10_jpeg_{train,test}.npz`,
# `official/` (a copy of kaiwenzha/contrastive-poisoning, timed beside a noise step), and
# `study.tar.gz` of an earlier machine, whose finished cells stay finished.
# BUDGET: seconds in all (840). STAGES: which of them ("tests benchmarks study"). PYTHON: the
# interpreter (python3). TINY=1 tries every line with tiny sizes, also without a GPU. One stage that fails does not keep the others from running; the exit code
# is then 1.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
carried=$(cd "${2:-$1}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python3} tiny=${TINY:-} budget=${BUDGET:-840} failed=0
stages=${STAGES:-tests benchmarks study}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Small operations on the processor would wake all of many cores, which takes longer than they do;
# and runs beside each other share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export PYTHONUNBUFFERED=1 CP_PLUGIN_RESULTS="$out" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec > >(tee -a "$out/job.log") 2>&1

wanted() { [[ " $stages " == *" $1 "* ]]; }
left() { echo $((budget - SECONDS)); }
stage() { # stage NAME MOST_SECONDS COMMAND…
    local name=$1 most=$2 begun=$SECONDS code
    shift 2
    if [ "$(left)" -lt "$most" ]; then most=$(left); fi
    if [ "$most" -le 0 ]; then echo "== $name: no time left"; return; fi
    echo "== $name, at most $most s"
    timeout --kill-after=10 "$most" "$@"
    code=$?
    echo "== $name: exit $code after $((SECONDS - begun)) s"
    case $name-$code in study-124 | *-0) ;; *) failed=1 ;; esac
}

if compgen -G "$carried/wheels/*.whl" >/dev/null; then
    stage wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$work/site" "$carried"/wheels/*.whl
fi
# What an installation would bring: Hydra finds the configurations by a plugin.
mkdir -p "$work/site/hydra_plugins"
cp cp_plugin/integrations/search_path.py "$work/site/hydra_plugins/cp_plugin.py"
export PYTHONPATH="$work/site:$PYTHONPATH"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.cuda.is_available(),
    torch.cuda.get_device_name() if torch.cuda.is_available() else "")' || exit 2

# 1. What depends on the device. Not in parallel: there is one.
chosen=() && [ -n "$tiny" ] && chosen=(-k "rows or group")
wanted tests && stage tests "${TESTS_SECONDS:-90}" "$python" -m pytest -q -p no:cacheprovider \
    tests/integration/test_on_device.py "${chosen[@]}"

# 2. Benchmarks, the authors' code beside them.
official=() && [ -d "$carried/official" ] && official=(--official "$carried/official")
bench() { # bench NAME MOST_SECONDS COMMAND…
    if wanted benchmarks || wanted "$1"; then stage "$@"; else echo "== $1: left out"; fi
}
if [ -n "$tiny" ]; then
    bench step 300 "$python" -m tests.bench.step --precision 32 --batch 2 --rows 24 --repeats 1
    bench mirror 300 "$python" -m tests.bench.mirror --repeats 1
    bench whole 300 "$python" -m tests.bench.whole --tiny --pairs 1 \
        --rows "32 px, small network, batch 64"
else
    bench step 60 "$python" -m tests.bench.step --precision bf16 --batch 512 --repeats 5 \
        "${official[@]}"
    bench whole 60 "$python" -m tests.bench.whole --precision bf16-mixed \
        --rows "32 px, ResNet-18, batch 512"
    bench mirror 40 "$python" -m tests.bench.mirror --repeats 7
fi

# 3. Cells in the order of their value; each writes its JSON when it is finished.
wanted study || exit $failed
study=tests/bench/gpu/cifar10.yaml
if [ -n "$tiny" ]; then
    study=tests/bench/gpu/tiny.yaml
elif [ -f "$carried/cifar10_jpeg_train.npz" ]; then
    stage unpack 60 "$python" -m tests.bench.gpu.carry unpack "$carried" "$work/cifar10"
    export CIFAR10="$work/cifar10"
else
    echo "== study: no cifar10_jpeg_train.npz in $carried, left out"
    exit $failed
fi
[ -f "$carried/study.tar.gz" ] &&
    stage resume 30 "$python" -m tests.bench.gpu.carry resume "$carried/study.tar.gz" "$work/study"
keep() { "$python" -m tests.bench.gpu.carry keep "$work/study" "$out/study.tar.gz"; }
(while sleep 30; do keep; done) &
keeper=$!
reserve=15 # seconds to keep what is there
stage study $(($(left) - reserve)) "$python" -c \
    'import sys; from cp_plugin.apps.cli import main; sys.argv = ["cp-plugin", *sys.argv[1:]]; main()' \
    study "$study" --out "$work/study"
kill $keeper
wait $keeper 2>/dev/null
keep
exit $failed
