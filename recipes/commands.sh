# What the longer recipes share: how mistakes are told, and how commands are shown, found and run. Sourced, never run.

fail() { # MESSAGE: a mistake in the call
  echo "${0##*/}: $1; see --help" >&2
  exit 2
}

usage() { # the comment at the head of the script
  sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "$0"
}

quoted() { # WORD…: one line that a shell reads as these words
  local word text=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,+-]*) if [[ $word == *\'* ]]; then word=$(printf '%q' "$word"); else word="'$word'"; fi ;;
    esac
    text="$text $word"
  done
  echo "${text# }"
}

find_program() { # sets `dinov2`, the words that start the program, and `python`
  if command -v dinov2 >/dev/null; then
    dinov2=(dinov2)
  elif command -v python >/dev/null; then
    dinov2=(python -m dinov2cli)
  else
    dinov2=(python3 -m dinov2cli)
  fi
  python=$(command -v python3 || command -v python) || fail "no python found"
}

# A command runs in the background with the signals of a foreground one, so that SIGTERM sent to the script alone, as a
# scheduler does, reaches it at once. Ctrl-C goes to both of them anyway.
child='' stop='' again=''
trap 'stop=130 again=yes' INT
trap 'stop=75 again=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM USR1
run() { # COMMAND…: leaves its exit code in `code`, and in `stop` the code to end with where a signal stopped it
  (
    trap - INT QUIT TERM USR1
    exec "$@"
  ) >/dev/null &
  child=$!
  [[ $stop != 75 ]] || kill -TERM "$child" # sent before there was a child to pass it to
  while :; do
    again='' code=0
    wait "$child" || code=$?
    [[ -n $again ]] || break # a signal ends wait early: the command is still saving
  done
  child=''
  if [[ -z $stop && ($code -eq 75 || $code -eq 130) ]]; then stop=$code; fi
}
