#!/usr/bin/env bash
# From a raw pool to a curated training set, as LVD-142M was made (Oquab et al. 2023, section 3 and appendix A).
#
#   recipes/lvd142m.sh --pool DATA --query DATA… --against DATA… -m MODEL -o OUT [options]
#
# Steps, each a command of its own with a directory in OUT; the last is a selection that `dinov2 pretrain` opens
#   copies            features for copy detection (where --copy-model is given)
#   unique            one image of every group of copies
#   evaluation/NAME   features of an evaluation set (where --copy-model is given)
#   clean-NAME        the pool without what resembles that set; one after the other
#   embeddings        features for retrieval, of what is left of the pool
#   queries/NAME      the same of a curated set
#   curated           what the curated sets ask for, and the sets themselves
# OUT/table.md counts the images after each of them and what every curated set brought.
#
# Options
#   --pool DATA               raw images
#   --query [NAME=]DATA       a curated set to look for; may be repeated. Behind its ? stand, next to what DATA takes,
#                             mode=sample|cluster                                              (default: sample)
#                             neighbours=K   of each image, mode sample                        (default: 4)
#                             more_than=N    images of the set that a cluster must hold more than (default: 3)
#                             per_cluster=N  images drawn from each such cluster               (default: 10000)
#                             per_set=N      at most, of all                   (default: 1000000 in mode cluster)
#                             include=true|false  whether to keep the set itself               (default: true)
#   --against [NAME=]DATA     evaluation images that no training image may resemble; may be repeated
#   -m, --model MODEL         gives the features for retrieval (paper: a ViT-H/16 trained on ImageNet-22k)
#   -o, --out OUT             where all is written
#   --copy-model MODEL        gives the features for copy detection, as sscd:FILE; without it copies are found by bytes,
#                             pixels and perceptual hash
#   --threshold COSINE        of copies within the pool          (default: 0.6 for sscd:, else what dedup takes for MODEL)
#   --against-threshold COSINE  of copies of evaluation images   (default: 0.45 for sscd:, else as above)
#   --copy-neighbours K       looked at per image, in the search for copies                    (default: 64)
#   --against-components      drop also all that hangs together with a copy of an evaluation image, as the paper does
#   --clusters N              of the pool, mode cluster     (default: one per 64 images, at most the paper's 100000)
#   --target-size N           images to keep of the pool                          (default: all that is asked for)
#   --no-query                choose --target-size images evenly over a tree of clusters (arXiv 2405.15613), no --query
#   --levels LIST             sizes of that tree, finest first; there 10000000,500000,50000,10000 (default: by the pool)
#   --pack FORMAT             also store the chosen images: parquet, webdataset or folder
#   --pack-size PX            shorter side of those                                            (default: 512)
#   --set STEP.KEY=VALUE      a setting of one kind of step: copies, unique, clean, embeddings or curated, as
#                             embeddings.pool=mean; may be repeated
#   --memory SIZE             for the searches, as 64GB
#   --launch COMMAND          starts every step, as 'accelerate launch --config_file FILE'; the same line on every machine
#   -n, --processes N         processes of this machine, one per GPU
#   --device NAME             cpu, cuda …
#   --workers N               processes that decode images
#   --seed N                  of everything random
#   --dry-run                 print the commands, one per line, and run nothing
#   -h, --help                this text
#
# Examples
#   The paper's sizes and sets; copies of the sets lie below sets/, 12,800 shards of the crawl below crawl/:
#   recipes/lvd142m.sh --pool 'crawl/{00000..12799}.tar' --copy-model sscd:sscd_disc_mixup.torchscript.pt \
#     --against sets/imagenet1k/val --against sets/ade20k/val --against sets/oxford5k --against sets/paris6k … \
#     -m vith16-run --query sets/imagenet22k --query sets/landmarks \
#     --query 'imagenet1k=sets/imagenet1k/train?neighbours=32' \
#     --query 'sets/caltech101?mode=cluster' --query 'sets/aircraft?mode=cluster' --query 'sets/flowers?mode=cluster' … \
#     --launch 'accelerate launch --config_file nodes.yaml' -o lvd
#   dinov2 pretrain lvd/curated --config vitl14-long -o run
#   Without curated sets:
#   recipes/lvd142m.sh --pool crawl/ -m vits14-run -o chosen --no-query --target-size 1000000
#
# The same line again continues where it stopped. A step that fails ends the recipe with its exit code: 1 the work failed,
# 2 usage, 3 no such input, 75 and 130 stopped by a signal; 0 done.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=recipes/commands.sh
. "$here/commands.sh"
pool='' model='' out='' copy_model='' threshold='' against_threshold='' copy_neighbours=64 components=''
clusters='' target='' no_query='' levels='' launch='' memory='' dry=''
queries=() references=() pack=() settings=() machine=()

while [[ $# -gt 0 ]]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=yes; continue ;;
    --no-query) no_query=yes; continue ;;
    --against-components) components=yes; continue ;;
    -h | --help) usage; exit 0 ;;
    --*=*) set -- "${option#*=}" "$@"; option=${option%%=*} ;;
  esac
  case $option in
    --pool | --query | --against | -m | --model | -o | --out | --copy-model | --threshold | --against-threshold | \
      --copy-neighbours | --clusters | --target-size | --levels | --pack | --pack-size | --set | --memory | --launch | \
      -n | --processes | --device | --workers | --seed) ;;
    *) fail "unknown option $option" ;;
  esac
  [[ $# -gt 0 && -n $1 ]] || fail "$option needs a value"
  case $option in
    --pool) pool=$1 ;;
    --query) queries+=("$1") ;;
    --against) references+=("$1") ;;
    -m | --model) model=$1 ;;
    -o | --out) out=$1 ;;
    --copy-model) copy_model=$1 ;;
    --threshold) threshold=$1 ;;
    --against-threshold) against_threshold=$1 ;;
    --copy-neighbours) copy_neighbours=$1 ;;
    --clusters) clusters=$1 ;;
    --target-size) target=$1 ;;
    --levels) levels=$1 ;;
    --pack | --pack-size) pack+=("$option" "$1") ;;
    --set) settings+=("$1") ;;
    --memory) memory=$1 ;;
    --launch) launch=$1 ;;
    *) machine+=("$option" "$1") ;;
  esac
  shift
done

for pair in pool:"$pool" model:"$model" out:"$out"; do
  [[ -n ${pair#*:} ]] || fail "--${pair%%:*} is missing"
done
if [[ -n $no_query ]]; then
  [[ ${#queries[@]} -eq 0 ]] || fail "--no-query and --query: expected one of the two"
  [[ -n $target ]] || fail "--no-query needs --target-size, the number of images to keep"
else
  [[ ${#queries[@]} -gt 0 ]] || fail "--query is missing, the curated sets to look for (or --no-query)"
  [[ -z $levels ]] || fail "--levels belongs to --no-query"
fi
for setting in ${settings[@]+"${settings[@]}"}; do
  [[ $setting =~ ^(copies|unique|clean|embeddings|curated)\.[^=]+= ]] ||
    fail "--set $setting: expected STEP.KEY=VALUE, the step being copies, unique, clean, embeddings or curated"
done
if [[ $copy_model == sscd:* ]]; then # the paper's thresholds are those of this descriptor and of no other
  threshold=${threshold:-0.6} against_threshold=${against_threshold:-0.45}
fi

# Every set is NAME<tab>DATA<tab>BUDGET in `sets`: DATA without the options of a query set, which BUDGET holds with
# their ?. A set without a name has the last part of its path.
sets=() names=' '
parse() { # OPTION [NAME=]DATA
  local data=$2 name='' budget='' rest='' part parts
  if [[ $data =~ ^([A-Za-z0-9._-]+)=(.*)$ ]]; then name=${BASH_REMATCH[1]} data=${BASH_REMATCH[2]}; fi
  [[ -n $data ]] || fail "$1 $2: expected NAME=DATA"
  if [[ $1 == --query && $data == *\?* && ! -e $data ]]; then
    IFS='&' read -r -a parts <<<"${data##*\?}"
    for part in "${parts[@]}"; do
      case $part in
        mode=* | neighbours=* | more_than=* | per_cluster=* | per_set=* | include=*) budget="$budget&$part" ;;
        *) rest="$rest&$part" ;;
      esac
    done
    data=${data%\?*}${rest:+?${rest#&}} budget=${budget:+?${budget#&}}
  fi
  if [[ -z $name ]]; then
    name=${data%%\?*} name=${name%/} name=${name##*[/:]} name=${name//[^A-Za-z0-9._-]/-}
  fi
  [[ $names != *" $1/$name "* ]] || fail "$1 $2: a second set named $name; name it, as $1 OTHER=DATA"
  names="$names$1/$name "
  sets+=("${1#--}"$'\t'"$name"$'\t'"$data"$'\t'"$budget")
}
for text in ${references[@]+"${references[@]}"}; do parse --against "$text"; done
for text in ${queries[@]+"${queries[@]}"}; do parse --query "$text"; done

find_program
if [[ -n $launch ]]; then read -r -a dinov2 <<<"$launch -m dinov2cli"; fi
steps=()
step() { # STEP PLACE COMMAND…: run or print one command that writes OUT/PLACE; what fails ends the recipe
  local kind=$1 place=$2 setting own=()
  shift 2
  for setting in ${settings[@]+"${settings[@]}"}; do
    [[ $setting != "$kind".* ]] || own+=(--set "${setting#*.}")
  done
  set -- "${dinov2[@]}" "$@" -o "$out/$place" ${own[@]+"${own[@]}"} ${machine[@]+"${machine[@]}"}
  steps+=("$place")
  if [[ -n $dry ]]; then
    quoted "$@"
    return 0
  fi
  if [[ -z $stop ]]; then
    echo "== $place" >&2
    run "$@"
  fi
  [[ -z $stop ]] || exit "$stop"
  [[ $code -eq 0 ]] || { echo "lvd142m.sh: $place failed with exit code $code" >&2 && exit "$code"; }
}

search=(${memory:+--memory "$memory"})
alike=(${threshold:+--threshold "$threshold"})
input=$pool
if [[ -n $copy_model ]]; then
  step copies copies embed "$pool" -m "$copy_model"
  input=$out/copies
  search+=(--set "neighbours=$copy_neighbours")
fi
step unique unique dedup "$input" ${alike[@]+"${alike[@]}"} ${search[@]+"${search[@]}"}
clean=$out/unique
for entry in ${sets[@]+"${sets[@]}"}; do
  IFS=$'\t' read -r option name data budget <<<"$entry"
  [[ $option == against ]] || continue
  if [[ -n $copy_model ]]; then
    step copies "evaluation/$name" embed "$data" -m "$copy_model"
    data=$out/evaluation/$name
  fi
  step clean "clean-$name" dedup "$clean" --against "$data" ${alike[@]+"${alike[@]}"} \
    ${against_threshold:+--set "against_threshold=$against_threshold"} ${components:+--against-components} \
    ${search[@]+"${search[@]}"}
  clean=$out/clean-$name
done

step embeddings embeddings embed "$clean" -m "$model"
wanted=()
for entry in ${sets[@]+"${sets[@]}"}; do
  IFS=$'\t' read -r option name data budget <<<"$entry"
  [[ $option == query ]] || continue
  step embeddings "queries/$name" embed "$data" -m "$model"
  wanted+=(--query "$out/queries/$name$budget")
done
[[ -n $no_query ]] || wanted+=(--include-queries)
step curated curated curate "$out/embeddings" ${wanted[@]+"${wanted[@]}"} ${clusters:+--set "clusters=$clusters"} \
  ${levels:+--set "levels=[$levels]"} ${target:+--target-size "$target"} ${memory:+--memory "$memory"} \
  ${pack[@]+"${pack[@]}"}

[[ -z $dry ]] || exit 0
"$python" "$here/lvd142m_table.py" "$out" "${steps[@]}" >&2
[[ -t 1 ]] || echo "$out/curated"
