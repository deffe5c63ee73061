# Sourced by the batch scripts beside it: brings a job to the software, by what cluster.env says.
#
# Sets: python    the interpreter
#       pyxis     options that make srun start a command in the container, by pyxis
#       in_front  words before a command that runs in the container, by apptainer
# shellcheck shell=bash disable=SC2034 # used by those who source it

set +u # what sites define is not ours to mend

# ---- cluster.env, under what is set already
site=${MLM_CLUSTER_ENV-slurm/cluster.env}
if [[ -n $site && -f $site ]]; then
	declare -A given=()
	for name in ${!MLM_@} ${!GLOO_@} ${!NCCL_@} ${!UCX_@} ${!OMP_@} ${!TORCH_@} ${!WANDB_@} ${!HF_@}; do given[$name]=${!name}; done
	set -a
	# shellcheck source=/dev/null
	source "$site"
	set +a
	for name in "${!given[@]}"; do export "$name=${given[$name]}"; done
elif [[ -n ${MLM_CLUSTER_ENV-} ]]; then
	echo "MLM_CLUSTER_ENV: no file '$MLM_CLUSTER_ENV'" >&2
	return 2
fi

# ---- The software
if [[ -n ${MLM_MODULES-} ]]; then
	# shellcheck source=/dev/null
	type module >/dev/null 2>&1 || source /etc/profile
	# shellcheck disable=SC2086 # a list of names
	module load $MLM_MODULES || return 2
fi
if [[ -n ${MLM_CONDA-} ]]; then
	eval "$(conda shell.bash hook)" && conda activate "$MLM_CONDA" || return 2
fi
if [[ -n ${MLM_VENV-} ]]; then
	# shellcheck source=/dev/null
	source "$MLM_VENV/bin/activate" || return 2
fi
set -u
python=${MLM_PYTHON-python}

# ---- The container, if there is one
pyxis=()    # options of srun
in_front=() # words before the command
if [[ -n ${MLM_CONTAINER-} ]]; then
	mounts=${MLM_CONTAINER_MOUNTS-$PWD:$PWD}${MLM_STAGE_DIR:+,$MLM_STAGE_DIR:$MLM_STAGE_DIR}
	case ${MLM_CONTAINER_RUNTIME-pyxis} in
	pyxis)
		pyxis=(--container-image="$MLM_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
		;;
	apptainer)
		in_front=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$MLM_CONTAINER")
		;;
	*)
		echo "MLM_CONTAINER_RUNTIME: '$MLM_CONTAINER_RUNTIME' must be pyxis or apptainer" >&2
		return 2
		;;
	esac
fi
