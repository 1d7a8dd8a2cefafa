"""RSA in nnU-Net v2: its planned networks with RSA blocks, and trainers. Training needs the extra ``nnunet``.

``plans`` writes plans whose network has RSA blocks, in JSON alone; ``network`` builds what they name; ``weights`` adds
blocks to a checkpoint of plain nnU-Net; ``trainers`` is the folder for the variable ``nnUNet_extTrainer``.
"""
