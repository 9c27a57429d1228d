"""Fields of the scripts' namespaces that `get_images` does not read, because they cannot change its images, or do not as they stand.

Collected from the parsers of SRe2L, CDA, SCDD, DWA, UFC, CV-DD, FADRM, DIVA, FD2, LPLD, DELT, GUARD, WMDD, CUDD and PRISM.
"""

from __future__ import annotations

from typing import Any

# Names of runs, folders, devices, trackers, loaders; networks and their weights, which come as model_teacher; ranges of images, of which
# ipc_id is one; and what matters only where a field of NEUTRAL has another value.
ELSEWHERE = frozenset(
    """
    exp_name name tag note notes comment timestamp config cfg config_file project entity
    arch arch_name arch_path arch_checkpoint model model_name ckpt_path ckpt checkpoint pretrained pretrained_path pre_train_path
    pretrained_model_type model_pool_dir
    verifier_path verifier_arch_path verifier_weight_path verifier_checkpoint
    ipc ipc_number ipc_start ipc_end ipc_id ipc_init index_start index_end init_part_num
    G GPU_ID gpu gpu_id gpu_ids gpu_device gpus device devices ngpus cuda world_size rank local_rank node_rank dist_url dist_backend
    distributed multiprocessing_distributed subprocess_num
    wandb use_wandb wandb_key wandb_name wandb_project wandb_group wandb_job_type wandb_entity wandb_mode
    workers num_workers j pin_memory
    print_period print_freq print_every log_every log_freq log_interval log_dir log_path verbose debug matplotlib
    data data_path data_dir data_root dataset_root root train_data_path real_data_path data_select_path select_num
    output output_dir out_dir save_dir save_path save_every save_freq result_dir results_dir
    evaluate start_epoch resume
    r_wb weight_temperature voter_type model_choice model_prior_weight_dict sre2l_model
    patch_dir patch_diff initialisation_dir store_initialised_images flatness_weight ema_alpha soft_target
    """.split()
)

# Switches of other methods, with the values that leave the loop as SRe2L's, CDA's or DWA's is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "per_class_bn": (False,),
    "wb": (False,),
    "weight_wb": (False,),
    "initialisation_method": ("Guassian", "Gaussian"),  # the first is their spelling
    "initial_img_dir": ("None", ""),
    "model_setting": (0,),
    "selected_size": (1,),
    "start_index": (0,),
    "bn_hook_type": ("class",),
    "class_start": (0,),
    "flatness": (False,),
    "use_early_late": (False,),
    "round_iterations": (0,),
    "round_lr_reset": (False,),
    "tanh_space": (False,),
    "student_dir": ("",),
    "class_guide": ("",),
    "fp16": (False,),
    "amp": (False,),
}
