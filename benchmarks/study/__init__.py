"""The paper's experiment in miniature: base, SFT, GRPO, GDPO and MRPO on phantom data, and ablations of MRPO."""
