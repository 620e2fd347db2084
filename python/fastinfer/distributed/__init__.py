"""Several processes that run one model: process groups, what each of them holds, how they start.

span.py             which rows or columns of a tensor a rank has
stages.py           how many layers each stage of a pipeline has
group.py            the collectives of a group of ranks
all_reduce.py       sums over ranks through memory that GPUs write to each other
tensor_parallel.py  what layers call between two matrix products
sampling.py         tokens from logits that are cut over ranks
control.py          sockets between the rank that schedules and the others
launch.py worker.py start, supervision and end of the processes
"""
