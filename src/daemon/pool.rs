use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Enough for the little that a job keeps on its stack, libblkid and SQLite included.
const STACK: usize = 512 << 10;
/// How long a thread waits for another job before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// How many threads may wait for somebody far away without counting. What is locked of a thread's memory is what it has
/// touched, some 50 KiB.
const MOST_WAITING: usize = 1024;

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    /// The pool that this thread is of, while it counts.
    static OWN: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Does `work`, which waits for somebody far away, a key server say. If this thread is one of a pool, another one does
/// the pool's jobs meanwhile: however many wait for a server that does not answer, no other job waits for them.
pub fn while_waiting<R>(work: impl FnOnce() -> R) -> R {
    let _away = OWN.take().map(Away::new);
    work()
}

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
    /// Those that wait for somebody far away are not among them.
    threads: usize,
    idle: usize,
    waiting: usize,
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
        self.shared.find_thread(&mut state);
    }
}

impl Shared {
    /// Sees to it that the newest job gets a thread, if there may be one.
    fn find_thread(self: &Arc<Self>, state: &mut State) {
        if state.idle >= state.jobs.len() {
            self.changed.notify_one();
        } else if state.threads < self.limit {
            let shared = Arc::clone(self);
            let thread = std::thread::Builder::new().name("worker".to_owned()).stack_size(STACK);
            match thread.spawn(move || shared.work()) {
                Ok(_) => state.threads += 1,
                // The job waits for one of the threads there are; its deadline answers if none comes.
                Err(error) => tracing::error!("no thread could be started: {error}"),
            }
        }
    }

    fn work(self: &Arc<Self>) {
        let leaving = Leaving(self);
        OWN.set(Some(Arc::clone(self)));
        let mut state = self.state();
        loop {
            // Another one took the place of a thread that was away.
            if state.threads > self.limit {
                return leaving.leave(state);
            }
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
                return leaving.leave(state);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that does not count for the time being, unless too many do not.
struct Away {
    pool: Arc<Shared>,
    counts: bool,
}

impl Away {
    fn new(pool: Arc<Shared>) -> Self {
        let mut state = pool.state();
        let counts = state.waiting == MOST_WAITING;
        if !counts {
            state.waiting += 1;
            state.threads -= 1;
            if !state.jobs.is_empty() {
                pool.find_thread(&mut state);
            }
        }
        drop(state);
        Away { pool, counts }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        if !self.counts {
            let mut state = self.pool.state();
            state.waiting -= 1;
            state.threads += 1;
        }
        OWN.set(Some(Arc::clone(&self.pool)));
    }
}

/// Counts a thread out, also when its job panicked.
struct Leaving<'a>(&'a Shared);

impl Leaving<'_> {
    /// Counts it out in the same moment in which it was seen not to be needed: of several none may leave for the sake of
    /// another one that leaves as well.
    fn leave(self, mut state: MutexGuard<'_, State>) {
        state.threads -= 1;
        std::mem::forget(self);
    }
}

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
        let mut numbers: Vec<i32> = (0..20).map(|_| finished.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
        numbers.sort();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>());
        drop(release);
    }

    #[test]
    fn jobs_that_wait_for_somebody_far_away_take_no_thread_from_the_others() {
        const LIMIT: usize = 4;
        let pool = Pool::new(LIMIT);
        let (done, finished) = mpsc::channel();
        let mut answers = Vec::new();
        for _ in 0..10 * LIMIT {
            let (answer, answered) = mpsc::channel::<()>();
            let done = done.clone();
            answers.push(answer);
            pool.run(move || {
                let answered = while_waiting(|| while_waiting(|| answered.recv().is_err()));
                done.send(answered).unwrap();
            });
        }
        let (done_at_once, at_once) = mpsc::channel();
        for _ in 0..100 {
            let done = done_at_once.clone();
            pool.run(move || done.send(()).unwrap());
        }
        (0..100).for_each(|_| at_once.recv_timeout(Duration::from_secs(60)).unwrap());
        assert!(finished.try_recv().is_err(), "nobody has answered yet");
        drop(answers);
        (0..10 * LIMIT).for_each(|_| assert!(finished.recv_timeout(Duration::from_secs(60)).unwrap()));
        // Those that are too many by now end.
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while pool.shared.state().threads > LIMIT {
            assert!(std::time::Instant::now() < end, "{} threads are left", pool.shared.state().threads);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(while_waiting(|| 7), 7, "on a thread of no pool");
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
        finished.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
