//! How long queued work takes, by the device's own clock.

use super::StageTime;
use crate::cuda::driver::check_call;
use crate::cuda::{Device, Graph, Stream};
use crate::error::{Error, Result};
use crate::layer::Stage;
use cudarc::driver::sys;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// Calls captured into one graph, fewer if that many take longer than [`LONG_ENOUGH`].
const CALLS: usize = 20;
/// Seconds of a replay that neither the launch nor the clock's resolution shows in.
const LONG_ENOUGH: f64 = 0.02;
/// Replays (and eager calls) of which the median counts.
const REPEATS: usize = 9;
/// Load before graphs are timed: an idle device runs at another clock than a busy one.
const LOAD: Duration = Duration::from_millis(150);

/// A stream of its own and two events on it.
pub(super) struct Clock<'a> {
    device: &'a Device,
    stream: sys::CUstream,
    events: [sys::CUevent; 2],
}

impl<'a> Clock<'a> {
    #[allow(unsafe_code)]
    pub(super) fn new(device: &'a Device) -> Result<Self> {
        // The oldest driver that has the reading of events this is built with.
        const OLDEST_DRIVER: i32 = 12_080;
        let version = device.info().driver_version;
        if version < OLDEST_DRIVER {
            return Err(Error::Device {
                argument: "cuda",
                actual: format!("a driver for CUDA {version}"),
                expected: format!("at least {OLDEST_DRIVER}, to time steps"),
            });
        }
        let _current = device.current()?;
        let mut clock = Self { device, stream: null_mut(), events: [null_mut(); 2] };
        // SAFETY: every pointer is valid for its call; what was made is destroyed with the clock.
        unsafe {
            check_call(
                "cuStreamCreate",
                sys::cuStreamCreate(&mut clock.stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32),
            )?;
            for event in &mut clock.events {
                check_call("cuEventCreate", sys::cuEventCreate(event, 0))?;
            }
        }
        Ok(clock)
    }

    pub(super) fn stream(&self) -> Stream {
        Stream(self.stream as u64)
    }

    pub(super) fn time(&self, stage: Stage, launch: impl Fn(Stream) -> Result<()>) -> Result<StageTime> {
        let (graph_seconds, eager_seconds) = self.graph_and_eager(launch)?;
        Ok(StageTime { stage, graph_seconds, eager_seconds })
    }

    /// Seconds of one call inside a graph, under load, and launched from the host.
    pub(super) fn graph_and_eager(&self, launch: impl Fn(Stream) -> Result<()>) -> Result<(f64, f64)> {
        let eager_seconds = self.median(1, &launch)?;
        let calls = ((LONG_ENOUGH / eager_seconds.max(1e-9)) as usize).clamp(1, CALLS);
        let graph = Graph::capture(self.device, |stream| (0..calls).try_for_each(|_| launch(stream)))?;
        self.load(&[&graph])?;
        Ok((self.median(calls, |_| self.replay(&graph))?, eager_seconds))
    }

    /// Replays graphs by turns for as long as [`LOAD`].
    fn load(&self, graphs: &[&Graph]) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < LOAD {
            for graph in graphs {
                self.elapsed(|_| self.replay(graph))?;
            }
        }
        Ok(())
    }

    /// Median seconds of one call of each of `works` inside a graph of several; all of them by turns, so that they
    /// meet the same clock, and under load.
    pub(super) fn in_turns(&self, works: &[impl Fn(Stream) -> Result<()>]) -> Result<Vec<f64>> {
        const ROUNDS: usize = 5;
        /// Seconds of a replay; there are many.
        const SHORT: f64 = 0.002;
        let mut graphs = Vec::with_capacity(works.len());
        for work in works {
            self.elapsed(work)?;
            let calls = ((SHORT / self.elapsed(work)?.max(1e-9)) as usize).clamp(1, CALLS);
            graphs.push((Graph::capture(self.device, |stream| (0..calls).try_for_each(|_| work(stream)))?, calls));
        }
        self.load(&graphs.iter().map(|(graph, _)| graph).collect::<Vec<_>>())?;
        let mut seconds = vec![Vec::with_capacity(ROUNDS); works.len()];
        for _ in 0..ROUNDS {
            for ((graph, calls), seconds) in graphs.iter().zip(&mut seconds) {
                seconds.push(self.elapsed(|_| self.replay(graph))? / *calls as f64);
            }
        }
        let median = |mut seconds: Vec<f64>| {
            seconds.sort_by(f64::total_cmp);
            seconds[ROUNDS / 2]
        };
        Ok(seconds.into_iter().map(median).collect())
    }

    /// Median seconds of `work`, which is `calls` calls, after two that do not count.
    pub(super) fn median(&self, calls: usize, work: impl Fn(Stream) -> Result<()>) -> Result<f64> {
        let mut seconds = Vec::with_capacity(REPEATS);
        for repeat in 0..REPEATS + 2 {
            let elapsed = self.elapsed(&work)?;
            if repeat >= 2 {
                seconds.push(elapsed / calls as f64);
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[REPEATS / 2])
    }

    pub(super) fn device(&self) -> &Device {
        self.device
    }

    #[allow(unsafe_code)]
    pub(super) fn elapsed(&self, work: impl Fn(Stream) -> Result<()>) -> Result<f64> {
        let _current = self.device.current()?;
        let mut milliseconds = 0.0;
        // SAFETY: stream and events are the clock's own and live; the pointer is valid for the call.
        unsafe {
            check_call("cuEventRecord", sys::cuEventRecord(self.events[0], self.stream))?;
            work(self.stream())?;
            check_call("cuEventRecord", sys::cuEventRecord(self.events[1], self.stream))?;
            check_call("cuEventSynchronize", sys::cuEventSynchronize(self.events[1]))?;
            let result = sys::cuEventElapsedTime_v2(&mut milliseconds, self.events[0], self.events[1]);
            check_call("cuEventElapsedTime", result)?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Queues a graph on the clock's stream.
    #[allow(unsafe_code)]
    fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: the stream is the clock's own; what was captured outlives the clock's waits, as its caller says.
        unsafe { graph.replay(self.stream()) }
    }
}

impl Drop for Clock<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: made once, destroyed once, after their work is done. Failures were reported where they happened.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            for event in self.events.into_iter().filter(|event| !event.is_null()) {
                sys::cuEventDestroy_v2(event);
            }
            if !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}
