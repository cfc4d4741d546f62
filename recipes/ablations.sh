#!/usr/bin/env bash
# Ablation studies of the method at any size: every arm is trained and measured alike, and one table compares them.
#
#   recipes/ablations.sh --study NAME --data DATA --test DATA -o OUT [options]
#
# Studies
#   loss         the full objective, then without KoLeo, iBOT, DINO, Sinkhorn-Knopp, untied heads, one at a time
#   resolution   low, high, and low with a short last phase at high; each measured at both sizes
#   size         architectures of growing size
#   ladder       from an iBOT-like baseline to the full method, each row adding to the one before
#   data         one recipe on sets of equal size out of one pool: uncurated (drawn at random), curated (those nearest to
#                curated images), balanced (spread evenly over clusters), and those curated images alone
#   distill      one small model: trained from scratch, and distilled from a larger one by the teacher's heads, by learned
#                heads, by features and with Gram matching, as long each; every difference from scratch with its interval
#
# Options
#   --study NAME              loss, resolution, size, ladder, data or distill
#   --data DATA               images to train on; their labels serve the measuring only        (not for data)
#   --test DATA               labelled images to measure on
#   -o, --out OUT             OUT/NAME/ARM-sSEED/ holds run/ and results, OUT/NAME/table.md and table.csv the summary
#   --train DATA              labelled images the measuring learns from                        (default: --data; --query)
#   --config RECIPE           recipe of every arm                                              (default: tiny-cpu)
#   --budget AMOUNT           length of every run, as '300 steps' or '20000 images'            (default: the recipe's)
#   --seeds LIST              as 0,1                                                           (default: 0)
#   --tasks LIST              knn, linear or both, as knn,linear                               (default: knn)
#   --only LIST               these arms alone, as full,no-koleo
#   --set KEY=VALUE           a setting of every arm; may be repeated; an arm's own settings win
#   --device NAME             cpu, cuda …, for every command
#   --workers N               processes that decode images, for every command
#   --dry-run                 print the commands, one per line, and run nothing
#   -h, --help                this text
# resolution
#   --low GLOBAL[,LOCAL]      crop sizes in pixels; local: half of global                      (default: 32)
#   --high GLOBAL[,LOCAL]     the same at high resolution                                      (default: 64)
#   --phase-budget AMOUNT     length of the last phase                                         (default: 100 steps)
# size
#   --archs LIST              names, each with dimensions of its own if wanted, NAME:WIDTHxDEPTHxHEADS
#                             (default: vitt8:64x4x1,vitt8,vitt8:192x6x3)
# ladder; the defaults fit tiny-cpu
#   --ladder-patch FROM,TO         patch size                                                  (default: 16,8)
#   --ladder-local FROM,TO         local crop, where the recipe's is no multiple of both patches
#   --ladder-prototypes FROM,TO                                                                (default: 64,128)
#   --ladder-momentum FROM,TO      of the teacher                                              (default: 0.987,0.98)
#   --ladder-warmup FROM,TO        of the learning rate, a share of the run                    (default: 0.05,0.1)
#   --ladder-batch FROM,TO         images per step                                             (default: 32,64)
#   --ladder-layerscale GAIN                                                                   (default: 1.0)
#   --ladder-drop-path RATE        stochastic depth                                            (default: 0.1)
# data
#   --pool DATA               raw images, better without duplicates: the output of `dinov2 dedup`
#   --query DATA              curated images. Of more than --size a random part serves as the arm query-only; where there
#                             are fewer, its runs see each one more often: every run sees as many images as any other
#   --size N                  images of each set
#   --embed MODEL             gives the features that images are chosen by    (default: tiny, untrained: colour, texture)
#   --embed-pool NAME         cls, mean or cls+mean                  (default: cls; mean for the untrained model)
# distill; the defaults fit tiny-cpu
#   --teacher MODEL           a model you have               (default: pretrained here, by --config for --budget)
#   --distill-config RECIPE   recipe of distillation                                     (default: distill-tiny-cpu)
#   --distill-budget AMOUNT   length of the small model's runs, from scratch and distilled     (default: as --budget)
#   --student LIST            settings of the small model, from scratch and distilled
#                             (default: model.arch=vitt8,model.embed_dim=64,model.depth=3,model.num_heads=1)
#
# Examples
#   recipes/ablations.sh --study loss --data demo:photos --test 'demo:photos?split=test' -o ablations --seeds 0,1
#   recipes/ablations.sh --study resolution --data train/ --test 'val/?label=folder' --train 'train/?label=folder' \
#     -o ablations --config vits14-short --low 224,98 --high 518,224 --phase-budget '10000 steps' --tasks knn,linear
#   recipes/ablations.sh --study size --data train/ --test 'val/?label=folder' --train 'train/?label=folder' \
#     -o ablations --config vits14-short --archs vits14,vitb14,vitl14
#   recipes/ablations.sh --study ladder --data train/ --test 'val/?label=folder' --train 'train/?label=folder' \
#     -o ablations --config vitl14-long --ladder-patch 16,14 --ladder-local 96,98 --ladder-prototypes 65536,131072 \
#     --ladder-momentum 0.996,0.994 --ladder-warmup 0.1,0.16 --ladder-batch 16,32 --ladder-layerscale 1.0e-5 \
#     --ladder-drop-path 0.4
#   recipes/ablations.sh --study data --pool unique --query 'train/?label=folder' --test 'val/?label=folder' \
#     --size 1000000 --embed facebook/dinov2-small -o ablations --config vits14-short --budget '100000 steps'
#   recipes/ablations.sh --study distill --data train/ --test 'val/?label=folder' --train 'train/?label=folder' \
#     -o ablations --teacher run --config vits14-short --distill-config distill-vits14 --student model.arch=vits14 \
#     --distill-budget '100000 steps' --tasks knn,linear
#
# The same line again continues where it stopped. An arm that fails is named in the table and the others go on; the exit
# code is then 1. 0 done, 2 usage, 75 and 130 stopped by a signal.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=recipes/commands.sh
. "$here/commands.sh"
# shellcheck source=recipes/ablations_distill.sh
. "$here/ablations_distill.sh"
study='' data='' test='' train='' out='' config=tiny-cpu budget='' seeds=0 tasks=knn only='' dry=''
low=32 high=64 phase_budget='100 steps' archs=vitt8:64x4x1,vitt8,vitt8:192x6x3
patch=16,8 local_crop='' prototypes=64,128 momentum=0.987,0.98 warmup=0.05,0.1 batch=32,64 layerscale=1.0 drop_path=0.1
pool='' query='' amount='' embed='' embed_pool=''
common=() machine=()

line=$(quoted "$(basename "$0")" "$@")

while [[ $# -gt 0 ]]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=yes; continue ;;
    -h | --help) usage; exit 0 ;;
    --*=*) set -- "${option#*=}" "$@"; option=${option%%=*} ;;
  esac
  case $option in
    --study | --data | --test | --train | -o | --out | --config | --budget | --seeds | --tasks | --only | --set | \
      --device | --workers | --low | --high | --phase-budget | --archs | --ladder-* | --pool | --query | --size | \
      --embed | --embed-pool | --teacher | --distill-config | --distill-budget | --student) ;;
    *) fail "unknown option $option" ;;
  esac
  [[ $# -gt 0 && -n $1 ]] || fail "$option needs a value"
  case $option in
    --study) study=$1 ;;
    --data) data=$1 ;;
    --test) test=$1 ;;
    --train) train=$1 ;;
    -o | --out) out=$1 ;;
    --config) config=$1 ;;
    --budget) budget=$1 ;;
    --seeds) seeds=$1 ;;
    --tasks) tasks=$1 ;;
    --only) only=$1 ;;
    --set) common+=(--set "$1") ;;
    --device | --workers) machine+=("$option" "$1") ;;
    --low) low=$1 ;;
    --high) high=$1 ;;
    --phase-budget) phase_budget=$1 ;;
    --archs) archs=$1 ;;
    --pool) pool=$1 ;;
    --query) query=$1 ;;
    --size) amount=$1 ;;
    --embed) embed=$1 ;;
    --embed-pool) embed_pool=$1 ;;
    --teacher) teacher=$1 ;;
    --distill-config) distill_config=$1 ;;
    --distill-budget) distill_budget=$1 ;;
    --student) student=$1 ;;
    --ladder-patch) patch=$1 ;;
    --ladder-local) local_crop=$1 ;;
    --ladder-prototypes) prototypes=$1 ;;
    --ladder-momentum) momentum=$1 ;;
    --ladder-warmup) warmup=$1 ;;
    --ladder-batch) batch=$1 ;;
    --ladder-layerscale) layerscale=$1 ;;
    --ladder-drop-path) drop_path=$1 ;;
    *) fail "unknown option $option" ;;
  esac
  shift
done

needed=(study:"$study" data:"$data" test:"$test" out:"$out")
if [[ $study == data ]]; then
  [[ -z $data ]] || fail "--data $data: the study of data takes --pool and --query"
  needed=(pool:"$pool" query:"$query" size:"$amount" test:"$test" out:"$out")
fi
for pair in "${needed[@]}"; do
  [[ -n ${pair#*:} ]] || fail "--${pair%%:*} is missing"
done
[[ $seeds =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds $seeds: expected whole numbers, as 0,1"
[[ $tasks =~ ^(knn|linear)(,(knn|linear))*$ ]] || fail "--tasks $tasks: expected knn, linear or both, as knn,linear"
train=${train:-${data:-$query}}
[[ ${amount:-1} =~ ^[1-9][0-9]*$ ]] || fail "--size $amount: expected a number of images"
[[ $study != data || $budget != *epoch* ]] ||
  fail "--budget '$budget': the sets may differ in size; expected steps or images, so that all runs see as many"
[[ $student =~ ^[^=,\ ]+=[^,\ ]+(,[^=,\ ]+=[^,\ ]+)*$ ]] || fail "--student $student: expected KEY=VALUE,KEY=VALUE"
for pair in patch:"$patch" prototypes:"$prototypes" momentum:"$momentum" warmup:"$warmup" batch:"$batch" \
  local:"${local_crop:-0,0}"; do
  [[ ${pair#*:} =~ ^[0-9.]+,[0-9.]+$ ]] || fail "--ladder-${pair%%:*} ${pair#*:}: expected two numbers, FROM,TO"
done
for pair in low:"$low" high:"$high"; do
  [[ ${pair#*:} =~ ^[0-9]+(,[0-9]+)?$ ]] || fail "--${pair%%:*} ${pair#*:}: expected pixels, GLOBAL or GLOBAL,LOCAL"
done

# The arms in the order of the table: names[i] with all its settings, one per line, in full[i], and what the table says
# of it before it has run in shown[i].
names=() full=() shown=() sizes=('')
arm() { # NAME SETTING…
  names+=("$1")
  shift
  full+=("$(printf '%s\n' "$@")")
  shown+=("$(printf '%s\t' "$@")")
}

rungs=()
rung() { # NAME SETTING…: all settings so far and these, which take the place of earlier ones of the same key
  local name=$1 new old kept
  shift
  for new in "$@"; do
    kept=()
    for old in ${rungs[@]+"${rungs[@]}"}; do
      [[ ${old%%=*} == "${new%%=*}" ]] || kept+=("$old")
    done
    rungs=(${kept[@]+"${kept[@]}"} "$new")
  done
  arm "$name" "${rungs[@]}"
  shown[${#shown[@]} - 1]=$(printf '%s\t' "$@")
}

case $study in
  loss)
    arm full
    arm no-koleo loss.koleo_weight=0
    # The paper's row is "without masked image modelling". Masks are there for the iBOT term, so they go with it: kept,
    # they would be a further augmentation of the DINO term. (A weight of 0 in the released code leaves them on.)
    arm no-ibot loss.ibot_weight=0 masks.probability=0
    arm no-dino loss.dino_weight=0
    arm softmax-centring loss.centering=softmax
    arm tied-heads heads.untied=false
    ;;
  resolution)
    half() { if [[ $1 == *,* ]]; then echo "${1#*,}"; else echo $(($1 / 2)); fi; }
    low_local=$(half "$low") high_local=$(half "$high") low=${low%,*} high=${high%,*}
    arm low "crops.global_size=$low" "crops.local_size=$low_local"
    arm high "crops.global_size=$high" "crops.local_size=$high_local"
    arm low-then-high "crops.global_size=$low" "crops.local_size=$low_local" \
      "phases=[{budget: $phase_budget, global_size: $high, local_size: $high_local}]"
    sizes=("$low" "$high")
    ;;
  size)
    for entry in ${archs//,/ }; do
      dims=${entry#"${entry%%:*}"}
      [[ $dims =~ ^(:([0-9]+)x([0-9]+)x([0-9]+))?$ ]] || fail "--archs $entry: expected NAME or NAME:WIDTHxDEPTHxHEADS"
      if [[ -n $dims ]]; then
        arm "${entry/:/-}" "model.arch=${entry%%:*}" "model.embed_dim=${BASH_REMATCH[2]}" \
          "model.depth=${BASH_REMATCH[3]}" "model.num_heads=${BASH_REMATCH[4]}"
      else
        arm "$entry" "model.arch=$entry"
      fi
    done
    ;;
  ladder)
    # The recipes let the teacher's temperature rise three times as long as the learning rate; so do both ends here.
    triple() { awk -v share="$1" 'BEGIN { printf "%g", 3 * share }'; }
    rung baseline loss.centering=softmax heads.untied=false loss.koleo_weight=0 model.ffn=mlp model.layerscale=0 \
      model.drop_path=0 "heads.prototypes=${prototypes%,*}" "model.patch_size=${patch%,*}" \
      ${local_crop:+"crops.local_size=${local_crop%,*}"} "teacher.momentum=${momentum%,*}" \
      "optim.warmup=${warmup%,*}" "loss.teacher_temperature_warmup=$(triple "${warmup%,*}")" \
      "data.batch_size=${batch%,*}"
    rung layerscale-drop-path "model.layerscale=$layerscale" "model.drop_path=$drop_path"
    rung prototypes "heads.prototypes=${prototypes#*,}"
    rung koleo loss.koleo_weight=0.1
    rung swiglu model.ffn=swiglu
    rung patch "model.patch_size=${patch#*,}" ${local_crop:+"crops.local_size=${local_crop#*,}"}
    rung momentum "teacher.momentum=${momentum#*,}"
    rung warmup "optim.warmup=${warmup#*,}" "loss.teacher_temperature_warmup=$(triple "${warmup#*,}")"
    # A budget in steps shows more images from here on; one in images holds them equal and takes fewer steps.
    rung batch "data.batch_size=${batch#*,}"
    rung sinkhorn loss.centering=sinkhorn
    rung untied-heads heads.untied=true
    ;;
  data)
    arm uncurated "random images of the pool"
    arm curated "images of the pool nearest to the query images"
    arm balanced "images spread evenly over clusters of the pool"
    arm query-only "the query images"
    ;;
  distill)
    distil_arms
    ;;
  *) fail "--study $study: expected loss, resolution, size, ladder, data or distill" ;;
esac

for name in ${only//,/ }; do
  [[ " ${names[*]} " == *" $name "* ]] || fail "--only $name: the arms of $study are ${names[*]}"
done

find_program

failed=0
step() { # PLACE STEP COMMAND…: run or print one command; a failure is written down for the table
  local place=$1 name=$2
  shift 2
  if [[ -n $dry ]]; then
    quoted "$@"
    return 0
  fi
  [[ -n $stop ]] || run "$@"
  [[ -z $stop ]] || finish "$stop"
  [[ $code -ne 0 ]] || return 0
  echo "ablations.sh: $place: $name failed with exit code $code; the other arms go on" >&2
  echo "$name exit $code" >>"$place/failed"
  failed=1
  return 1
}

# The images of the study of data, chosen once for all seeds, below OUT/data/sets.
features=(-m "${embed:-tiny}")
[[ -n $embed$embed_pool ]] || embed_pool=mean
[[ -z $embed_pool ]] || features+=(--pool "$embed_pool")
made=' '
choose() { # ARM PLACE
  local arm=$1 place=$2 sets=$out/$study/sets
  one() { # NAME COMMAND…: one directory of `sets`
    [[ $made != *" $1 "* ]] || return 0
    step "$place" images "${dinov2[@]}" "${@:2}" -o "$sets/$1" ${machine[@]+"${machine[@]}"} || return 1
    made="$made$1 "
  }
  [[ $arm == query-only ]] || one pool-embeddings embed "$pool" "${features[@]}" || return 1
  case $arm in curated | query-only) one query-embeddings embed "$query" "${features[@]}" || return 1 ;; esac
  case $arm in
    uncurated) one "$arm" curate "$sets/pool-embeddings" --target-size "$amount" --mode random ;;
    curated) one "$arm" curate "$sets/pool-embeddings" --query "$sets/query-embeddings" --target-size "$amount" ;;
    balanced) one "$arm" curate "$sets/pool-embeddings" --target-size "$amount" ;;
    query-only) one "$arm" curate "$sets/query-embeddings" --target-size "$amount" --mode random ;;
  esac
}

pretrain() { # PLACE STEP RUN BUDGET OPTION…
  step "$1" "$2" "${dinov2[@]}" pretrain "$data" -o "$3" --config "$config" ${4:+--budget "$4"} --seed "$seed" \
    ${common[@]+"${common[@]}"} "${@:5}" ${machine[@]+"${machine[@]}"}
}

finish() { # EXIT_CODE: make the table of what there is
  "$python" "$here/ablations_table.py" "$out/$study" >&2 || exit 1
  [[ -t 1 ]] || echo "$out/$study/table.md"
  exit "$1"
}

if [[ -z $dry ]]; then
  mkdir -p "$out/$study"
  {
    printf 'command\t%s\n' "$line"
    printf 'results'
    for task in ${tasks//,/ }; do for size in "${sizes[@]}"; do printf '\t%s' "$task${size:+-$size}"; done; done
    echo
    [[ -z $teacher ]] || printf 'given\tteacher\n'
    for i in "${!names[@]}"; do printf 'arm\t%s\t%s\n' "${names[i]}" "${shown[i]}"; done
  } >"$out/$study/study.tsv"
fi

for seed in ${seeds//,/ }; do
  for i in "${!names[@]}"; do
    [[ -z $only || ",$only," == *",${names[i]},"* ]] || continue
    place=$out/$study/${names[i]}-s$seed
    own=()
    while IFS= read -r setting; do
      [[ -z $setting ]] || own+=(--set "$setting")
    done <<<"${full[i]}"
    if [[ -z $dry ]]; then
      echo "== $study: ${names[i]}, seed $seed" >&2
      mkdir -p "$place"
      rm -f "$place/failed"
    fi
    if [[ $study == data ]]; then
      own=() data=$out/$study/sets/${names[i]}
      choose "${names[i]}" "$place" || continue
    fi
    model=$place/run
    if [[ $study == distill ]]; then
      [[ ${names[i]} != teacher || -z $teacher ]] || model=$teacher
      distil "${names[i]}" "$place" ${own[@]+"${own[@]}"} || continue
    else
      pretrain "$place" pretrain "$model" "$budget" ${own[@]+"${own[@]}"} || continue
    fi
    for task in ${tasks//,/ }; do
      for size in "${sizes[@]}"; do
        result=$task${size:+-$size}
        step "$place" "$result" "${dinov2[@]}" eval "$task" "$model" --train "$train" --test "$test" \
          -o "$place/$result" ${size:+--set "image_size=$size"} ${machine[@]+"${machine[@]}"} || true
      done
    done
  done
  [[ $study != distill ]] || differences
done

[[ -n $dry ]] || finish "$failed"
