"""Several processes that run one model: process groups, what each of them holds, how they start."""
