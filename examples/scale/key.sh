# Sourced: the key that trainers and servers share, in a file that only its owner can read, never in an argument,
# which every user of a machine can see.

make_key() { # FILE: written once, with mode 600
  if [[ ! -s $1 ]]; then # an empty one is left by an openssl that failed
    (umask 077 && mkdir -p "$(dirname "$1")" && openssl rand -hex 24 >"$1")
  fi
  local mode
  mode=$(stat -c %a "$1")
  if [[ $mode != 600 ]]; then
    echo "$1 has mode $mode: others may have read the key; delete it, and start again" >&2
    return 1
  fi
}
