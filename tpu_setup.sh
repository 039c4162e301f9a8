#!/usr/bin/env bash
# Creates a Cloud TPU VM, installs this checkout on its hosts and, given training flags, trains there until the run is
# finished, through any number of preemptions. --help tells how; --dry_run prints every command and runs none.
#
# For bash 3.2, which macOS has, and newer; it needs git and gcloud.
set -euo pipefail

readonly MOUNT=/mnt/shared         # where --storage is on every host
readonly MOUNT_UNIT=mnt-shared.mount
readonly UNIT=controlnet-training  # the systemd service that trains; also the folder of its log
readonly LOOKS=4                   # looks at a VM that has to stay up before a failure counts as not its own
readonly RESTARTS=3                # of a training that loses processes, in a row without a new checkpoint

# TPU images are Ubuntu 22.04, whose Python 3.10 is too old for JAX. uv brings its own and asks nothing of the image;
# packages made for one release of Ubuntu would have to be exchanged with each.
readonly PYTHON=3.12

main() {
  read_arguments "$@"
  check_arguments
  check_training_flags
  check_checkout
  check_with_trainer
  check_gcloud
  pack
  trap interrupted INT
  local losses=0 restarts=0 newest=''
  while true; do
    have_vm
    if ! training_is_running && ! prepare_hosts; then
      vm_goes_away || stop "$name could not be set up; what went wrong stands above."
      continue
    fi
    ((${#training[@]})) || break
    say_how_to_look
    watch_training
    case $outcome in
      finished) say_how_it_ends && break ;;
      preempted) say "$name was taken away." ;;
      lost)
        ((++losses <= LOOKS)) || stop "The training was lost $losses times without an exit code."
        say "$name lost its training, as by a reboot." ;;
      other) stop_for_other ;;
      stopped) stop "The training was stopped by a signal, but $name is still there, so somebody wanted it." ;;
      *)
        is_of_lost_process "${outcome#failed }" ||
          stop "The training failed by itself (exit code ${outcome#failed }), so it is not repeated."
        start_again_after_loss ;;
    esac
  done
  say_what_is_left
}

# --- what is asked for ------------------------------------------------------------------------------------------------

usage() {
  cat <<'END'
usage: ./tpu_setup.sh --name NAME --zone ZONE --type TYPE [--flag value ...] [-- TRAINING FLAGS]

Creates a Cloud TPU VM, or takes the one of that name, installs the commit that is checked out here on all of its hosts
and checks that JAX sees every device. With training flags, which are those of train_flax.py, it trains there and shows
the log. A VM that is preempted is deleted and created again, and the training resumed from its newest checkpoint; so
it is on a VM that stays when one of its processes is lost.
Ctrl-C ends only the watching; the same command takes it up again.

  --name NAME          the VM's name
  --zone ZONE          as us-central2-b
  --type TYPE          v2-8, v3-8, v4-8, v4-32, v5litepod-4 (v5e), v5litepod-16, v5p-8, v6e-8, ...
  --spot               a spot VM: cheaper, and Google may take it away at any time
  --project PROJECT    (default: that of gcloud's configuration)
  --version IMAGE      the runtime image (default: the one for the type)
  --storage WHERE      gs://BUCKET with a hierarchical namespace, or HOST:/PATH of an NFS server such as Filestore;
                       mounted at /mnt/shared on every host. Training needs it: --output_dir has to outlive the VM
  --send_tokens        copy HF_TOKEN and WANDB_API_KEY from this shell's environment to the hosts, in a file
  --poll_seconds N     between two looks at the VM (default: 30)
  --dry_run            print every command, as one can paste it, and run none
  --help

example: ./tpu_setup.sh --name circles --zone us-central2-b --type v4-8 --spot --storage gs://my-bucket -- \
  --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name=fusing/fill50k \
  --mixed_precision=bf16 --max_train_steps=15000 --output_dir=/mnt/shared/circles

for Stable Diffusion XL, with these: --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --resolution=1024 --train_batch_size=1 \
  --gradient_checkpointing
END
}

read_arguments() {
  name='' zone='' type='' project='' version='' storage='' poll_seconds=30
  spot=false send_tokens=false dry_run=false
  training=()
  local flag
  while (($#)); do
    flag=${1%%=*}
    case $flag in
      --help | -h) usage && exit ;;
      --spot | --send_tokens | --dry_run)
        [[ $1 == "$flag" ]] || mistake "$flag takes no value, but was given '${1#*=}'."
        printf -v "${flag#--}" true ;;
      --name | --zone | --type | --project | --version | --storage | --poll_seconds)
        [[ $1 == *=* ]] || set -- "$1=${2---}" "${@:3}" # "--" stands for a value that is missing
        [[ $1 != *=--* ]] || mistake "$flag needs a value, but none follows it."
        printf -v "${flag#--}" %s "${1#*=}" ;;
      --) shift && training=("$@") && break ;;
      *) mistake "'$1' is not known here; --help lists what is. Training flags come after --." ;;
    esac
    shift
  done
}

check_arguments() { # in variables, because bash 3.2 cannot read a pattern with parentheses
  local names='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$'
  local storages='^(gs://[a-z0-9][-_.a-z0-9]*[a-z0-9]|[-.A-Za-z0-9]+:/([^/[:space:]][^[:space:]]*)?)?$'
  [[ $name =~ $names ]] ||
    mistake "--name is '$name'; give one of lower-case letters, digits and dashes that begins with a letter."
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || mistake "--zone is '$zone'; give one such as us-central2-b."
  [[ $poll_seconds =~ ^[0-9]+$ ]] || mistake "--poll_seconds is '$poll_seconds'; give a whole number."
  [[ $storage =~ $storages ]] ||
    mistake "--storage is '$storage'; give gs://BUCKET, without a folder, or HOST:/PATH of an NFS server."
  ! $send_tokens || [[ -n ${HF_TOKEN:-}${WANDB_API_KEY:-} ]] ||
    mistake "--send_tokens finds neither HF_TOKEN nor WANDB_API_KEY in the environment; export one of them."
  where=("--zone=$zone" ${project:+"--project=$project"})
  check_type
}

# Images: Cloud TPU documentation, "TPU software versions". v4 and v5p count cores, of which a JAX device has two.
check_type() {
  local image='' per_device=1
  case $type in
    v2-* | v3-*) image=tpu-ubuntu2204-base ;;
    v4-*) image=tpu-ubuntu2204-base per_device=2 ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 per_device=2 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5e-*) mistake "--type is '$type', but v5e is ordered as v5litepod: give v5litepod-${type#*-}." ;;
    tpu7* | v7*) mistake "--type is '$type', but Cloud TPU VMs end with v6e: TPU7x needs Compute Engine or GKE." ;;
  esac
  [[ -n $image && ${type#*-} =~ ^[1-9][0-9]{0,4}$ && $((${type#*-} % per_device)) == 0 ]] ||
    mistake "--type is '$type'; give one such as v2-8, v3-8, v4-8, v4-32, v5litepod-4, v5p-8 or v6e-8."
  version=${version:-$image}
  devices=$((${type#*-} / per_device))
}

# What the trainer would find only when the VM is paid for.
check_training_flags() {
  extra_packages=()
  ((${#training[@]})) || return 0
  local resume_from
  output_dir=$(training_flag output_dir) resume_from=$(training_flag resume_from_checkpoint)
  [[ -n $storage ]] ||
    mistake "--storage is missing: the VM's own disk goes with it, so training needs gs://BUCKET or HOST:/PATH."
  [[ $output_dir == "$MOUNT"/?* && $output_dir != *'{timestamp}'* ]] ||
    mistake "--output_dir is '$output_dir', which no later VM would find; give a folder in $MOUNT, without {timestamp}."
  [[ -z $resume_from || $resume_from == latest ]] ||
    mistake "--resume_from_checkpoint is '$resume_from', but every new VM resumes from the newest; leave it out."
  [[ -z $(training_flag hub_token) ]] ||
    mistake "--hub_token would stand in process lists and logs; leave it out, export HF_TOKEN and give --send_tokens."
  if [[ $(training_flag report_to) == wandb ]]; then
    $send_tokens && [[ -n ${WANDB_API_KEY:-} ]] ||
      mistake "--report_to wandb needs a login on the VM: export WANDB_API_KEY and give --send_tokens."
    extra_packages+=(wandb)
  fi
  if [[ " ${training[*]} " == *' --push_to_hub '* ]]; then
    $send_tokens && [[ -n ${HF_TOKEN:-} ]] ||
      mistake "--push_to_hub needs a login on the VM: export HF_TOKEN and give --send_tokens."
  fi
  [[ $(training_flag evaluation_fidelity) != edges ]] || extra_packages+=(opencv-python-headless)
}

training_flag() { # the last value that the training flags give it, or nothing
  local word value='' is_next=false
  for word in "${training[@]}"; do
    case $word in
      "--$1="*) value=${word#*=} is_next=false ;;
      "--$1") is_next=true ;;
      *) ! $is_next || value=$word && is_next=false ;;
    esac
  done
  printf '%s' "$value"
}

check_checkout() {
  cd "$(dirname "${BASH_SOURCE[0]}")"
  commit=$(git rev-parse --verify HEAD 2>/dev/null) ||
    mistake "$PWD is not a git checkout, and the VM gets what git has of it: git clone the repository."
  [[ -z $(git status --porcelain --untracked-files=no) ]] ||
    mistake "$PWD has changes that are not committed, and would not reach the VM: commit them, or git stash."
  code=$(git rev-parse --git-path "tpu_setup-$name.tar.gz")
  tokens=$(git rev-parse --git-path "tpu_setup-$name.tokens")
}

# Where a Python here can run the trainer so far, it says itself what it does not accept.
check_with_trainer() {
  local answer
  ((${#training[@]})) && [[ $(training_flag config) != "$MOUNT"/* ]] || return 0
  answer=$(python3 train_flax.py "${training[@]}" --print_config 2>&1 >/dev/null) || true
  [[ $answer != *'train_flax.py: error: '* ]] || mistake "train_flax.py would not accept its flags: ${answer#*error: }"
}

check_gcloud() {
  local answer
  $dry_run || type -P gcloud >/dev/null ||
    mistake "gcloud is not installed; see https://cloud.google.com/sdk/docs/install."
  answer=$(run gcloud auth list --filter=status:ACTIVE '--format=value(account)') || answer=''
  $dry_run || [[ -n $answer ]] || mistake "gcloud is not logged in: run gcloud auth login."
  [[ $storage == gs://* ]] || return 0
  # A checkpoint is finished by renaming its folder. Other buckets rename file by file, and half of it may be done.
  answer=$(run gcloud storage buckets describe "$storage" --raw '--format=value(hierarchicalNamespace.enabled)') ||
    mistake "--storage is $storage, which gcloud cannot describe; its message above says why."
  $dry_run || [[ $answer == [Tt]rue ]] ||
    mistake "--storage is $storage, which has no hierarchical namespace, so that a preempted VM could leave half a" \
      "checkpoint. Create one that has, near the VM: gcloud storage buckets create gs://NAME --location=REGION" \
      "--uniform-bucket-level-access --enable-hierarchical-namespace"
}

# --- the VM -----------------------------------------------------------------------------------------------------------

is_fresh=false # created by this loop's turn, so that nothing can run there
had_vm=false   # one was there during this run of the script, so its arguments are right

# Goes on when the VM is there and ready.
have_vm() {
  is_fresh=false
  while true; do
    case $(vm_state) in
      READY) had_vm=true && return 0 ;;
      ABSENT) ! create_vm || return 0 ;;
      PREEMPTED | TERMINATED) # it can only be deleted
        run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet || pause ;;
      STOPPED | STOPPING)
        stop "$name is stopped. Start it: $(line gcloud compute tpus tpu-vm start "$name" "${where[@]}")" ;;
      UNREACHABLE)
        $had_vm || stop "gcloud cannot say whether $name exists; its message stands above."
        pause ;;
      *) say "$name is not ready yet." && pause ;;
    esac
  done
}

# The first time, a failure is the user's to see. Later it is a lack of capacity, which passes.
create_vm() {
  local optional=()
  ! $spot || optional=(--spot)
  say "Creating $name, a $type with $devices devices."
  if run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" \
    ${optional[@]+"${optional[@]}"}; then
    had_vm=true is_fresh=true
    return 0
  fi
  $had_vm || stop "$name could not be created; gcloud's message above says why. Where it lacks capacity, try later," \
    "in another zone, or another type."
  say "It could not be created; that is tried again."
  pause
  return 1
}

# One of Cloud TPU's states, ABSENT, or UNREACHABLE where the question itself fails. gcloud may add remarks to it.
vm_state() {
  local answer
  if answer=$(run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>&1); then
    if $dry_run; then answer=$($had_vm && echo READY || echo ABSENT); fi
    printf '%s\n' "$answer" | sed -n '/^[A-Z][A-Z_]*$/p' | head -n 1
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    printf '%s\n' "$answer" >&4
    echo UNREACHABLE
  fi
}

# Whether something failed because the VM is being taken away: its state may say so only after a while.
vm_goes_away() {
  local look
  for ((look = 0; look < LOOKS; look++)); do
    case $(vm_state) in READY | UNREACHABLE) pause ;; *) return 0 ;; esac
  done
  return 1
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

copy_to_all_hosts() {
  run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all
}

# --- what the hosts get -----------------------------------------------------------------------------------------------

# Once, so that a VM that replaces another gets the same code.
pack() {
  $dry_run || trap 'rm -f "$code" "$tokens"' EXIT
  say "The code is that of commit $commit."
  run git archive --format=tar.gz "--output=$code" "$commit"
  ! $send_tokens || write_tokens
}

write_tokens() {
  local variable
  say "HF_TOKEN and WANDB_API_KEY, where they are set, go into $tokens, for your eyes only."
  ! $dry_run || return 0
  rm -f "$tokens"
  for variable in HF_TOKEN WANDB_API_KEY; do
    [[ -z ${!variable:-} ]] || (umask 077 && printf '%s=%s\n' "$variable" "$(line "${!variable}")" >>"$tokens")
  done
}

# Called as a condition, where bash does not stop at errors: hence the &&.
prepare_hosts() {
  install_code && mount_storage && check_devices && start_training
}

install_code() {
  local packages
  packages=$(line 'jax[tpu]' ${extra_packages[@]+"${extra_packages[@]}"})
  say "Installing."
  copy_to_all_hosts "$code" controlnet.tar.gz &&
    { ! $send_tokens || copy_to_all_hosts "$tokens" controlnet-tokens; } &&
    on_all_hosts "set -euo pipefail
mkdir -p controlnet
tar -xzf controlnet.tar.gz -C controlnet
cd controlnet
[ -x ~/.local/bin/uv ] || curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
[ -d .venv ] || ~/.local/bin/uv venv --python $PYTHON .venv
~/.local/bin/uv pip install --python .venv/bin/python -r requirements_flax.txt $packages"
}

# By way of systemd, which at a shutdown lets the training save before it takes the folder away. The hosts have to see
# each other's files at once, so a bucket is mounted without a cache of what is in it.
mount_storage() {
  local install entry source=${storage#gs://}
  case $storage in
    '') return 0 ;;
    gs://*)
      install=$INSTALL_GCSFUSE
      entry="$source $MOUNT gcsfuse _netdev,allow_other,uid=\$(id -u),gid=\$(id -g)"
      entry+=",metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0 0 0" ;;
    *)
      install="sudo apt-get -o DPkg::Lock::Timeout=600 install --yes nfs-common"
      entry="$source $MOUNT nfs _netdev 0 0" ;;
  esac
  say "Mounting $storage."
  on_all_hosts "set -euo pipefail
mounted=\$(findmnt --noheadings --output SOURCE --mountpoint $MOUNT || true)
if [ -z \"\$mounted\" ]; then
$install
sudo mkdir -p $MOUNT
grep --quiet ' $MOUNT ' /etc/fstab || echo \"$entry\" | sudo tee -a /etc/fstab
sudo systemctl daemon-reload
sudo systemctl start $MOUNT_UNIT
elif [ \"\$mounted\" != $(line "$source") ]; then
echo \"$MOUNT is \$mounted already, and not $source: delete the VM, or give it that --storage.\" >&2
exit 1
fi"
}

# Cloud Storage documentation, "Install Cloud Storage FUSE". On a new VM, apt's lock may be held for minutes.
# shellcheck disable=SC2016 # expanded on the hosts
readonly INSTALL_GCSFUSE='curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg |
  sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
. /etc/os-release
echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]" \
  "https://packages.cloud.google.com/apt gcsfuse-$VERSION_CODENAME main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list
sudo apt-get -o DPkg::Lock::Timeout=600 update
sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse'

# The hosts find each other as they do in a training.
check_devices() {
  local counts
  say "Counting devices."
  counts=$(on_all_hosts "cd controlnet
.venv/bin/python -c '
import jax
from shared.config import TrainConfig
from flax_trainer.distributed.processes import join_processes
join_processes(TrainConfig())
print(\"jax.device_count() =\", jax.device_count())'" | sed -n 's/^jax.device_count() = //p' | sort -u) || return
  ! $dry_run || return 0
  if [[ $counts != "$devices" ]]; then
    say "jax.device_count() is ${counts:-missing}, but a $type has $devices devices. Is $name an older VM of another" \
      "type? Then delete it or choose another --name."
    return 1
  fi
  say "JAX sees all $devices devices."
}

# --- training ---------------------------------------------------------------------------------------------------------

# As a service: a lost connection does not touch it. Its command stands in a file, since systemd would replace the $ and
# % in it. A shutdown sends SIGTERM, upon which the trainer saves and the shell waits for its exit code. What TPUs read
# and write has to stay in memory, of which services may lock little.
start_training() {
  ((${#training[@]})) || return 0
  say "Starting the training."
  on_all_hosts "set -eu
mkdir -p $UNIT
cd $UNIT
rm -f exit_code
: >log
cat >command.sh <<'END_OF_COMMAND'
cd ~/controlnet
set -a
[ ! -e ~/controlnet-tokens ] || . ~/controlnet-tokens
set +a
trap : TERM
$(training_command) >~/$UNIT/log 2>&1
echo \$? >~/$UNIT/exit_code
END_OF_COMMAND
sudo systemd-run --unit=$UNIT --collect --uid=\"\$(id -u)\" --property=RequiresMountsFor=$MOUNT \\
  --property=TimeoutStopSec=10min --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
  /bin/bash ~/$UNIT/command.sh"
}

training_command() {
  ((!${#training[@]})) || line .venv/bin/python train_flax.py "${training[@]}" --resume_from_checkpoint=latest
}

# Sets `outcome` to one of training_state's words that mean an end, or `preempted`.
watch_training() {
  while true; do
    show_log
    find_outcome
    [[ $outcome == running ]] || return 0
    say "The connection was lost; the training goes on."
    pause
  done
}

show_log() {
  on_all_hosts "follow= pid=\$(systemctl show --property=MainPID --value $UNIT)
[ \"\$pid\" = 0 ] || follow=\"--follow --pid=\$pid\"
tail --lines=100 \$follow $UNIT/log" || true
}

training_is_running() {
  local state
  ! $is_fresh || return 1
  until state=$(training_state) && [[ $state != unreachable ]]; do
    case $(vm_state) in READY | UNREACHABLE) ;; *) return 1 ;; esac
    say "$name cannot be reached, so whether a training runs there is not known. Trying again."
    pause
  done
  [[ $state != other ]] || stop_for_other
  [[ $state == running ]]
}

stop_for_other() {
  stop "$name trains already, with other flags than these; $UNIT/command.sh there has them. Give the same flags to" \
    "watch it, or stop it first: $(line gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
      "--command=sudo systemctl stop $UNIT")"
}

# In one word for all hosts: running, other (runs, with other flags), lost (ended without an exit code, or never begun),
# stopped (by SIGTERM), finished, `failed CODE`; or unreachable.
training_state() {
  local answers answer state
  answers=$(on_all_hosts "cd $UNIT 2>/dev/null || { echo training: lost; exit; }
if systemctl is-active --quiet $UNIT; then
grep --quiet --fixed-strings -- $(line "$(training_command)") command.sh && echo training: running || echo training: other
elif [ ! -e exit_code ]; then echo training: lost
elif [ \"\$(cat exit_code)\" != 0 ]; then echo training: failed \"\$(cat exit_code)\"
elif grep --quiet 'continue with --resume_from_checkpoint latest' log; then echo training: stopped
else echo training: finished
fi") || answers='training: unreachable'
  ! $dry_run || answers='training: finished'
  for state in unreachable other running failed stopped lost finished; do
    case $answers in *"training: $state"*) break ;; esac
  done
  answers=$(printf '%s\n' "$answers" | sed -n "s/^training: \($state.*\)/\1/p" | sort -u)
  while IFS= read -r answer; do # of failures the one that forbids to start again
    state=$answer
    is_of_lost_process "${answer#failed }" || break
  done <<<"$answers"
  printf '%s\n' "$state"
}

# Whether a host's exit code says that a process was lost: the trainer's own word for it (shared/run/lost_process.py), or
# a signal, as of the out-of-memory killer or of JAX, which aborts. Starting again mends that. Ctrl-C and SIGTERM are
# somebody's wish.
is_of_lost_process() {
  [[ $1 == 75 ]] || { [[ $1 =~ ^1[2-5][0-9]$ ]] && (($1 > 128 && $1 != 130 && $1 != 143)); }
}

# What runs still on other hosts would wait for the process that is gone.
start_again_after_loss() {
  local reached
  reached=$(on_all_hosts "ls $(line "$output_dir") | sed -n 's/^checkpoint-\([0-9]*\)\$/\1/p' | sort -n | tail -n 1" |
    sort -n | tail -n 1) || reached=$newest
  if [[ $reached != "$newest" ]]; then
    newest=$reached restarts=0
  fi
  ((++restarts <= RESTARTS)) ||
    stop "The training lost a process again (exit code ${outcome#failed }), after $RESTARTS restarts that brought no" \
      "new checkpoint."
  say "The training lost a process (exit code ${outcome#failed }). It is started again on all hosts, from" \
    "${newest:+checkpoint-}${newest:-the beginning}."
  on_all_hosts "sudo systemctl stop $UNIT 2>/dev/null || true" || true
}

# A training also ends because its VM is about to go: with success where it had the time to save, and with any error
# where it, or another host of it, had not.
find_outcome() {
  local look=0
  while ((look++ < LOOKS)); do
    case $(vm_state) in
      READY | UNREACHABLE) outcome=$(training_state) ;;
      *) outcome=preempted ;;
    esac
    case $outcome in
      finished | preempted | running | other) return ;;
      unreachable) say "$name cannot be reached; the training does not depend on it." && look=0 ;;
      *) say "The training has ended ($outcome). Waiting whether $name goes, too." ;;
    esac
    pause
  done
}

# --- what is said -----------------------------------------------------------------------------------------------------

say_how_to_look() {
  local logs
  logs=$output_dir/$(training_flag logging_dir)
  [[ $logs != */ ]] || logs+=logs
  say "The log: $(line gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--command=tail -f $UNIT/log")"
  say "TensorBoard, then at http://localhost:6006:" \
    "$(line gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
      "--command=controlnet/.venv/bin/tensorboard --logdir $(line "$logs")" -- -L 6006:localhost:6006)"
}

say_how_it_ends() {
  if $dry_run; then
    say "Whenever $name is preempted, this, and all from its creation again:"
    say "$(line gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet)"
  else
    say "The training is finished; its result is in $output_dir, which is ${output_dir#"$MOUNT"/} in $storage."
  fi
}

say_what_is_left() {
  say "$name goes on and costs money. Enter it: $(line gcloud compute tpus tpu-vm ssh "$name" "${where[@]}")"
  say "Delete it: $(line gcloud compute tpus tpu-vm delete "$name" "${where[@]}")"
}

interrupted() {
  echo >&4
  say "Interrupted: what runs on $name, if it exists, goes on. The same command takes it up again."
  say "Stop the training, which saves it: $(line gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    "--command=sudo systemctl stop $UNIT")"
  say_what_is_left
  exit 130
}

mistake() {
  printf 'tpu_setup.sh: error: %s\n' "$*" >&4
  exit 2
}

stop() {
  printf 'tpu_setup.sh: error: %s\n' "$*" >&4
  ! $had_vm || say_what_is_left
  exit 1
}

say() {
  printf '# %s\n' "$*" >&3
}

pause() {
  $dry_run || sleep "$poll_seconds"
}

# Runs every command that changes or asks something outside, and prints it on stderr. A dry run only prints it, on
# stdout, where that and the comments are a script.
run() {
  if $dry_run; then
    line "$@" >&3
  else
    line + "$@" >&4
    "$@"
  fi
}

line() { # words as a shell reads them back
  local word words='' apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!-+A-Za-z0-9_./:=,@%]*) words+=" '${word//$apostrophe/$escaped}'" ;;
      *) words+=" $word" ;;
    esac
  done
  printf '%s\n' "${words# }"
}

exec 3>&1 4>&2 # the script's own, also where the output of a function is caught
main "$@"
