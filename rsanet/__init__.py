"""RSANet: recurrent slice-wise attention networks for 3-D medical images."""
