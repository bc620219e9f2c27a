"""Models, data and loops on torch and timm: anatomy, surgery, checkpoints, data sets, augmentation, training."""
