# Shared by the scripts of this folder: sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# Quiet, reproducible, and without a build server that stays after the script.
export DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1 # needs no libicu
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1 DOTNET_CLI_USE_MSBUILD_SERVER=0 MSBUILDDISABLENODEREUSE=1

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# confirm TEXT: asks the user. It answers yes where there is no terminal.
confirm() {
  if [ -t 0 ] && [ -t 2 ] && [ -z "${CI:-}" ]; then
    local answer
    read -r -p "$1 Go on? [Y/n] " answer
    case $answer in [nN]*) return 1 ;; esac
  fi
}

# need PROGRAM PACKAGE [PROGRAM PACKAGE ...]: installs the Debian packages of programs that are absent.
need() {
  local missing=()
  while [ $# -gt 0 ]; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2")
    shift 2
  done
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

# need_file FILE PACKAGE: the same for a file.
need_file() {
  [ -e "$1" ] || install_packages "$2"
}

install_packages() {
  command -v apt-get >/dev/null || die "please install: $*"
  confirm "apt will install: $*." || die "please install: $*"
  say "installing $*"
  as_root apt-get update -qq >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# Debian has no package of the .NET SDK: Microsoft's script installs it in the user's home.
install_dotnet() {
  local script=https://dot.net/v1/dotnet-install.sh
  confirm "$script will install the .NET SDK 10 in $HOME/.dotnet." \
    || die "the .NET SDK 10 is needed: see https://learn.microsoft.com/dotnet/core/install/linux-debian"
  need curl curl
  curl -fsSL "$script" | bash -s -- --channel 10.0 --install-dir "$HOME/.dotnet" >&2 \
    || die "the .NET SDK could not be installed"
}

# Installs what the native build needs.
need_build_tools() {
  command -v dotnet >/dev/null || PATH="$HOME/.dotnet:$PATH"
  command -v dotnet >/dev/null || install_dotnet
  command -v clang >/dev/null || command -v gcc >/dev/null || install_packages clang
  need_file /usr/include/zlib.h zlib1g-dev
}
