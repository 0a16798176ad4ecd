#!/bin/bash
# Runs a command again for as long as it ends because a process was lost.
#
#   docs/pods/restart.sh python -m train.main --config=FILE --workdir=DIR
until "$@"; do
  status=$?
  case $status in
    75 | 137) sleep 10 ;;
    *) exit "$status" ;;
  esac
done
