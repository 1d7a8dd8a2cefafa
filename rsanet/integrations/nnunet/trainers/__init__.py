"""The folder that ``nnUNet_extTrainer`` names. nnU-Net imports every module in it: only trainers belong here."""
