use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Enough for the little that a job keeps on its stack, libblkid and SQLite included.
const STACK: usize = 512 << 10;
/// How long a thread waits for another job before it ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Threads for jobs that may wait. There are as many as jobs at the same time, up to a limit; beyond
/// it jobs queue up.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Pool {
    /// A pool of `limit` threads at most.
    pub fn new(limit: usize) -> Self {
        Pool { shared: Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit }) }
    }

    /// Has `job` run on a thread of the pool.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() {
            self.shared.changed.notify_one();
        } else if state.threads < self.shared.limit {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("worker".to_owned()).stack_size(STACK);
            match thread.spawn(move || shared.work()) {
                Ok(_) => state.threads += 1,
                // The job waits for one of the threads there are; its deadline answers if none comes.
                Err(error) => tracing::error!("no thread could be started: {error}"),
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        let _leaving = Leaving(self);
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (woken, timeout) = self.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a thread out, also when its job panicked.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.state().threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_job_that_waits_delays_no_other() {
        let pool = Pool::new(4);
        let (release, released) = mpsc::channel::<()>();
        let (done, finished) = mpsc::channel();
        pool.run(move || assert!(released.recv().is_err()));
        for number in 0..20 {
            let done = done.clone();
            pool.run(move || done.send(number).unwrap());
        }
        let mut numbers: Vec<i32> = (0..20).map(|_| finished.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        numbers.sort();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>());
        drop(release);
    }

    #[test]
    fn a_panic_costs_one_thread_and_not_the_pool() {
        let pool = Pool::new(1);
        pool.run(|| panic!("on purpose"));
        let (done, finished) = mpsc::channel();
        while pool.shared.state().threads > 0 {
            std::thread::yield_now();
        }
        pool.run(move || done.send(()).unwrap());
        finished.recv_timeout(Duration::from_secs(5)).unwrap();
    }
}
