"""Checks a wheel for what a release needs: check_wheel.py WHEEL FOLDER...

It is a manylinux wheel, it has both licence texts, and none of its files names one of the folders.
"""

import sys
import zipfile


def main(wheel, folders):
    faults = [] if "-manylinux" in wheel else [f"{wheel} is not a manylinux wheel"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for licence in ("LICENSE-APACHE", "LICENSE-MIT"):
            if not any(name.endswith(f"/{licence}") for name in names):
                faults.append(f"{wheel} has no {licence}")
        for name in names:
            data = archive.read(name)
            faults += [f"{name} names the folder {folder}" for folder in folders if folder.encode() + b"/" in data]
    if faults:
        sys.exit("\n".join(faults))


main(sys.argv[1], sys.argv[2:])
