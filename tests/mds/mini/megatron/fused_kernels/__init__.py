import subprocess


def load(args):
    # obstacle: on CUDA the compiler is asked, whatever is going to be used
    subprocess.run(["nvcc", "-V"], check=True)
