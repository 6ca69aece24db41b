# Steps of .ci/run by name, and what is typed often. `just` alone lists them; `just STEP...` is `.ci/run STEP...`.

_list:
    @just --list

# everything that a change must pass
check:
    .ci/run

# single steps of .ci/run
run *STEPS:
    .ci/run {{STEPS}}

# cargo fmt, ruff and clang-format, in place
fix:
    .ci/run fix

# formats of Rust
format:
    .ci/run format

# ruff, mypy, clang-format
style:
    .ci/run style

# clippy over every workspace
lint:
    .ci/run lint

# tests of the workspace
test:
    .ci/run test

# ranks that are processes, over MPI
mpi:
    .ci/run mpi

# the CUDA kernels, compiled for every architecture
kernels:
    .ci/run kernels

# the GPU's tests on the CPU
emulate:
    .ci/run emulate

# documentation, warnings denied
document:
    .ci/run document

# every example
examples:
    .ci/run examples

# licences and sources of dependencies
dependencies:
    .ci/run dependencies

# the Python package
python:
    .ci/run python

# the crate for candle, on the CPU
candle:
    .ci/run candle

# checkpoints against Transformers' own blocks
witness:
    .ci/run witness

# the whole path under miri
miri:
    .ci/run miri

# what a release needs, made and checked without publishing
release-check:
    .ci/run release

# the README's picture
plot:
    benches/plot
