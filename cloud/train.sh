#!/usr/bin/env bash
# Runs a training for an engine that starts again what has failed (SkyPilot's managed jobs, a JobSet):
#
#   cloud/train.sh python3 train_flax.py FLAGS
#
# A training that is asked to stop, as before a preemption, saves and ends with success, which such an engine takes for
# the end of the work. Here it ends with 75, EX_TEMPFAIL of sysexits.h, as it does where its hosts have not found each
# other. Otherwise the exit code is the training's own: 0 for a finished one, 2 for a mistake, which would be met again.
set -u

readonly GOES_ON='Stopped by .*; continue with --resume_from_checkpoint latest|did not find each other'

log=$(mktemp)
"$@" >"$log" 2>&1 &
training=$!
# As process 1 of a container, this alone is sent the signal.
trap 'kill -TERM "$training" 2>/dev/null' TERM INT HUP
(
  trap '' TERM INT HUP # the last lines are still to come
  exec tail --follow --lines=+1 --sleep-interval=0.2 --pid="$training" "$log"
) &
shown=$!

wait "$training"
while kill -0 "$training" 2>/dev/null; do wait "$training"; done # a signal ends a wait, not the training
wait "$training"
code=$?
wait "$shown"
if grep --quiet --extended-regexp "$GOES_ON" "$log"; then code=75; fi
rm -f "$log"
exit "$code"
