# The study of distillation of ablations.sh: its arms, what makes them, and what tells them apart. Sourced, never run.
# shellcheck disable=SC2154  # what it uses of ablations.sh

teacher='' distill_config=distill-tiny-cpu distill_budget=''
student=model.arch=vitt8,model.embed_dim=64,model.depth=3,model.num_heads=1

distil_arms() {
  arm teacher
  arm scratch
  arm distill-heads teacher.heads=run
  arm distill-learned teacher.heads=learned
  local features=(loss.dino_weight=0 loss.ibot_weight=0 loss.koleo_weight=0 loss.feature_weight=1)
  arm features-cosine "${features[@]}" loss.feature=cosine
  arm features-smooth-l1 "${features[@]}" loss.feature=smooth_l1
  arm gram loss.gram_weight=1
  shown[0]=${teacher:-pretrained by $config} shown[1]="pretrained from scratch by $config"
}

# A teacher is made once for each seed, also where --only leaves it out, and not tried again after it failed.
taught=' '
teach() { # PLACE STEP RUN
  [[ -z $teacher && $taught != *" $seed "* ]] || return 0
  if [[ $taught == *" $seed:failed "* ]]; then
    echo "$2 not made" >>"$1/failed"
    return 1
  fi
  if pretrain "$@" "$budget"; then taught="$taught$seed "; else
    taught="$taught$seed:failed "
    return 1
  fi
}
distil() { # ARM PLACE OPTION…
  local arm=$1 place=$2 from=${teacher:-$out/$study/teacher-s$seed/run} long=${distill_budget:-$budget} small=() setting
  for setting in ${student//,/ }; do small+=(--set "$setting"); done
  case $arm in
    teacher) teach "$place" pretrain "$from" ;;
    scratch) pretrain "$place" pretrain "$place/run" "$long" "${small[@]}" ;;
    *)
      teach "$place" teacher "$from" || return 1
      step "$place" distill "${dinov2[@]}" distill "$data" --teacher "$from" -o "$place/run" \
        --config "$distill_config" ${long:+--budget "$long"} --seed "$seed" \
        ${common[@]+"${common[@]}"} "${small[@]}" "${@:3}" ${machine[@]+"${machine[@]}"}
      ;;
  esac
}
differences() { # of every arm from scratch, image by image: PLACE/RESULT-difference
  local name task place scratch=$out/$study/scratch-s$seed
  for name in "${names[@]}"; do
    place=$out/$study/$name-s$seed
    [[ $name != scratch ]] && { [[ -z $only || ",$only," == *",$name,"* ]]; } || continue
    for task in ${tasks//,/ }; do
      [[ -n $dry || (-f $scratch/$task/results.json && -f $place/$task/results.json) ]] || continue
      step "$place" "$task-difference" "${dinov2[@]}" eval compare "$scratch/$task" "$place/$task" --all \
        -o "$place/$task-difference" || true
    done
  done
}
