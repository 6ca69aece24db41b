//! What the properties are tested on: numbers, strides, machines; routings are in [`crate::routings`].

use expertile::cpu::{Cpu, Isa};
use expertile::{Float, MatrixRef};
use expertile_testkit::{Fill, Random};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;
use std::sync::{Arc, LazyLock};

/// Every instruction set this CPU has, on 1, 2 and 5 threads.
pub(crate) fn machines() -> impl Iterator<Item = Cpu> {
    static POOLS: LazyLock<Vec<Arc<rayon::ThreadPool>>> = LazyLock::new(|| {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        [1, 2, 5].into_iter().map(|threads| Arc::new(pool(threads))).collect()
    });
    Isa::available().into_iter().flat_map(|isa| POOLS.iter().map(move |pool| Cpu::with_isa(isa).in_pool(pool.clone())))
}

/// A number type, converted by `half` and not by the code under test.
pub(crate) trait Number: Float + std::fmt::Debug {
    fn exact(self) -> f32;
    fn nearest(x: f32) -> Self;
    /// Its bits, all NaNs made one: which NaN comes out of a sum is not part of any contract.
    fn bits(self) -> u32;
}

impl Number for f32 {
    fn exact(self) -> f32 {
        self
    }
    fn nearest(x: f32) -> Self {
        x
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { self.to_bits() }
    }
}

impl Number for bf16 {
    fn exact(self) -> f32 {
        bf16::to_f32(self)
    }
    fn nearest(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { u32::from(self.to_bits()) }
    }
}

impl Number for f16 {
    fn exact(self) -> f32 {
        f16::to_f32(self)
    }
    fn nearest(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { u32::from(self.to_bits()) }
    }
}

pub(crate) fn bits<T: Number>(values: &[T]) -> Vec<u32> {
    values.iter().map(|&value| value.bits()).collect()
}

pub(crate) fn exact<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.exact()).collect()
}

pub(crate) fn fills() -> impl Strategy<Value = Fill> {
    prop_oneof![
        3 => Just(Fill::Ordinary),
        2 => Just(Fill::Special),
        1 => Just(Fill::Bits),
        1 => Just(Fill::Zeros)
    ]
}

pub(crate) fn numbers<T: Number>(len: usize, fill: Fill, seed: u64) -> Vec<T> {
    expertile_testkit::numbers(&mut Random::new(seed), len, fill, T::nearest)
}

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strides {
    Contiguous,
    GapsBetweenRows,
    ColumnMajor,
    GapsEverywhere,
}

pub(crate) fn strides() -> impl Strategy<Value = Strides> {
    use Strides::{ColumnMajor, Contiguous, GapsBetweenRows, GapsEverywhere};
    select(&[Contiguous, GapsBetweenRows, ColumnMajor, GapsEverywhere][..])
}

/// A matrix that owns its memory: `values` where its strides put them, `poison` in between.
pub(crate) struct Strided<T> {
    data: Vec<T>,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<T: Copy> Strided<T> {
    pub(crate) fn new(values: &[T], rows: usize, cols: usize, strides: Strides, poison: T) -> Self {
        assert_eq!(values.len(), rows * cols);
        let strides = match strides {
            Strides::Contiguous => [cols, 1],
            Strides::GapsBetweenRows => [cols + 3, 1],
            Strides::ColumnMajor => [1, rows],
            Strides::GapsEverywhere => [2 * cols + 5, 2],
        };
        let len = if values.is_empty() { 0 } else { (rows - 1) * strides[0] + (cols - 1) * strides[1] + 1 };
        let mut data = vec![poison; len];
        for row in 0..rows {
            for col in 0..cols {
                data[row * strides[0] + col * strides[1]] = values[row * cols + col];
            }
        }
        Self { data, shape: [rows, cols], strides }
    }

    pub(crate) fn matrix(&self) -> MatrixRef<'_, T> {
        MatrixRef::with_strides(&self.data, self.shape[0], self.shape[1], self.strides[0], self.strides[1]).unwrap()
    }
}
