"""The device that everything here runs on, and what it says of itself."""

import subprocess

import torch

# A CPU serves for dry runs only.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_facts():
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        smi = ""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 0
    return dict(smi=smi, torch=torch.__version__, multiprocessors=multiprocessors)
