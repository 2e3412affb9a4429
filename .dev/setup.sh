#!/usr/bin/env bash
# .dev/setup.sh demo|test|bench|lint: prepares .venv for one make target. `make` calls it; it may be run by hand.
#
# Four steps: system packages, torch, Python packages (of the extra with that name), and the package itself (editable,
# with its C++ engine; not for lint). Each leaves a stamp with the key of what it was made from in .venv/.moe_comm/, and
# is skipped while the key is the same: with nothing to do this takes a fraction of a second.
#
# Reads: PYTHON  interpreter for .venv (default: python3, or the first python3.N that is new enough)
#        TORCH   torch requirement (default below; the Makefile sets it)
#        CXX     C++ compiler (default g++)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=${1:?"usage: .dev/setup.sh demo|test|bench|lint"}
case $profile in demo | test | bench | lint) ;; *) echo "unknown profile: $profile" >&2; exit 2 ;; esac
TORCH=${TORCH:-torch==2.13.0}
CXX=${CXX:-g++}
venv=.venv
python=$venv/bin/python
stamps=$venv/.moe_comm
log=build/setup.log
mkdir -p build

# ---- output ---------------------------------------------------------------------------------------------------------

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# step "text" command...: runs the command with its output in $log and shows that time passes. Returns its status.
step() {
  local text=$1 status=0 start=$SECONDS
  shift
  say "$text"
  printf '\n== %s\n' "$text" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null &
  local pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    local elapsed=$((SECONDS - start))
    if [ -t 1 ]; then
      printf '\r            ... %d s ' "$elapsed"
    elif ((elapsed >= ${next_note:=30})); then
      say "  still: $text ($elapsed s)"
      next_note=$((elapsed + 30))
    fi
  done
  unset next_note
  [ -t 1 ] && printf '\r\033[K'
  trap - INT TERM
  wait "$pid" || status=$?
  return $status
}

# must "text" command...: a step without which nothing goes on.
must() {
  step "$@" && return
  tail -n 15 "$log" >&2
  grep -E ': (fatal )?error: ' "$log" | head -n 15 >&2 || true # the compiler's are further up
  die "failed: $1 (everything is in $log)"
}

# ---- stamps ---------------------------------------------------------------------------------------------------------

fresh() { [ -f "$stamps/$1" ] && [ "$(<"$stamps/$1")" = "$2" ]; }
mark() { mkdir -p "$stamps" && printf '%s' "$2" >"$stamps/$1"; }
hash_of() { find "$@" -type f -print0 2>/dev/null | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32; }

has_header() { "$CXX" -E -x c++ - >/dev/null 2>&1 <<<"#include <$1>"; }
gcc_is_new() { [ "$("$CXX" -dumpversion 2>/dev/null | cut -d. -f1)" -ge 11 ] 2>/dev/null; }

# What the engine is compiled from: sources, compiler, and the headers of libfabric and libibverbs (they may be
# installed later).
engine_key() {
  local fabric verbs
  verbs=$(has_header infiniband/verbs.h && echo verbs || true)
  fabric=$("$CXX" -E -dM -x c++ - 2>/dev/null <<<'#include <rdma/fabric.h>' | grep -E 'FI_(MAJOR|MINOR)_VERSION ' || true)
  echo "$PWD $(hash_of pyproject.toml setup.py csrc) $("$CXX" -dumpfullversion 2>/dev/null || true)" $fabric $verbs
}
torch_key=$TORCH
deps_key="$TORCH $(hash_of pyproject.toml)"
engine_key=$(engine_key)

all_fresh() {
  [ -x "$python" ] && fresh where "$PWD" && fresh torch "$torch_key" && fresh "deps-$profile" "$deps_key" || return 1
  [ "$profile" = lint ] && return 0
  fresh engine "$engine_key" && compgen -G "moe_comm/_engine*.so" >/dev/null && [ -x "$venv/bin/moe-comm" ]
}
all_fresh && exit 0

[ ! -L $venv ] || die "$venv is a link: making it anew would empty $(readlink -f $venv); remove the link first"
exec 9>build/setup.lock # two makes at once: the second waits, and then has nothing to do
flock -n 9 || { say "another set-up is running here; waiting for it" && flock 9; }
all_fresh && exit 0
: >"$log"

# ---- 1. the interpreter, and packages of the system -----------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.14 python3.13 python3.12 python3.11 ""; do is_new_enough "$PYTHON" && break; done
  [ -n "$PYTHON" ] || die "Python 3.11 or newer is needed; if it has another name: make PYTHON=/path/to/python3.12 ..."
fi
is_new_enough "$PYTHON" || die "PYTHON=$PYTHON: Python 3.11 or newer is needed, found $("$PYTHON" -V 2>&1 || true)"

missing_packages() { # Debian's names of what is not here
  local name=python3
  [[ $(basename "$PYTHON") =~ ^python3\.[0-9]+$ ]] && name=$(basename "$PYTHON")
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo "$name-venv"
  [ -f "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || echo "$name-dev"
  gcc_is_new || echo g++
  has_header rdma/fabric.h || echo libfabric-dev
  has_header infiniband/verbs.h || echo libibverbs-dev
}
missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ] && ! fresh system "$missing"; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo -n "
  line="apt-get update && ${as_root:+sudo }apt-get install -y --no-install-recommends ${missing% }"
  apt_install() {
    $as_root apt-get update &&
      $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
  }
  if ! command -v apt-get >/dev/null; then
    say "not found, going on without; in Debian's names: ${missing% }"
  elif [ -n "$as_root" ] && ! sudo -n true 2>/dev/null; then
    say "not found, going on without; to install: sudo $line"
  elif ! step "apt-get install ${missing% }" apt_install; then
    say "that failed (see $log), going on without; by hand: ${as_root:+sudo }$line"
  fi
  missing=$(missing_packages | tr '\n' ' ')
fi

# ---- 2. .venv and torch ---------------------------------------------------------------------------------------------

is_usable() { # scripts in .venv/bin hold its path: in a directory that was moved or copied it is made again
  [ -x "$python" ] && is_new_enough "$python" && "$python" -m pip --version >/dev/null 2>&1 &&
    { [ ! -e "$stamps/where" ] || fresh where "$PWD"; }
}
if ! is_usable; then
  [[ $missing == *-venv* ]] && die "$PYTHON cannot make virtual environments: install ${missing% }"
  must "$venv with $("$PYTHON" -V)" "$PYTHON" -m venv --clear "$venv"
fi
mark where "$PWD"
[ -z "$missing" ] || mark system "$missing" # tried once; not again until something else is missing
pip=("$python" -m pip --disable-pip-version-check --no-input) # not a function: Ctrl-C must end it, not its shell

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }
if ! fresh torch "$torch_key"; then
  # Without its dependencies, as neither a wheel folder nor PyTorch's index need have them: step 3 adds them.
  if step "$TORCH: from this .venv or a configured wheel folder, if there" "${pip[@]}" install --no-index --no-deps "$TORCH"; then
    :
  elif ! has_nvidia_driver && step "$TORCH: CPU build, about 200 MB, from PyTorch's index" \
    "${pip[@]}" install --no-deps --retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu "$TORCH"; then
    :
  else
    must "$TORCH: CUDA build from the default index, about 3 GB with the libraries it needs" "${pip[@]}" install --no-deps "$TORCH"
  fi
  mark torch "$torch_key"
fi

# ---- 3. Python packages ---------------------------------------------------------------------------------------------

if ! fresh "deps-$profile" "$deps_key"; then
  mapfile -t requirements < <("$python" - "$profile" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    data = tomllib.load(file)
project = data["project"]
extra = project["optional-dependencies"][sys.argv[1]]
print(*data["build-system"]["requires"], *project["dependencies"], *extra, sep="\n")
PY
  )
  # torch stays what it is; pip then also sees which of its dependencies are missing
  installed=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
  echo "torch==$installed" >build/constraints.txt
  must "Python packages for $profile" "${pip[@]}" install -c build/constraints.txt "${requirements[@]}"
  mark "deps-$profile" "$deps_key"
fi

# ---- 4. the package -------------------------------------------------------------------------------------------------

if [ "$profile" != lint ] && ! { fresh engine "$engine_key" && compgen -G "moe_comm/_engine*.so" >/dev/null &&
  [ -x "$venv/bin/moe-comm" ]; }; then
  gcc_is_new || die "no $CXX >= 11 to compile the engine with: install ${missing% }"
  [[ $missing == *-dev* ]] && [[ $missing == *python* ]] && die "no Python.h: install ${missing% }"
  engine_key=$(engine_key) # again: step 1 may have installed headers
  must "moe_comm: compiling the C++ engine" "${pip[@]}" install -v --no-deps --no-build-isolation --editable .
  grep -o 'backends: .*' "$log" | tail -n 1 | while read -r line; do say "  $line"; done
  mark engine "$engine_key"
fi
say "ready for $profile"
