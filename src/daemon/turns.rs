use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pool::Pool;

/// How many calls may wait for their turn. QEMU has 64 threads in a pool of its own for what may wait, and few pools.
const MOST_WAITING: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

/// Has the calls of one guest worked on so many at a time, so that it does not take all threads of the pool. The others
/// wait here for their turn, without a thread.
pub struct Turns {
    at_a_time: usize,
    /// Whether a call still waits for its answer: its thread may have died.
    is_waiting: Box<dyn Fn(u64) -> bool + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    in_work: usize,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    call: u64,
    job: Job,
}

impl Turns {
    /// Turns for `at_a_time` calls. `is_waiting` says whether a call still waits for its answer.
    pub fn new(at_a_time: usize, is_waiting: impl Fn(u64) -> bool + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Turns { at_a_time, is_waiting: Box::new(is_waiting), state: Mutex::default() })
    }

    /// Has `job` for `call` run on a thread of `pool` at its turn, unless nobody waits for it by then. `false`, and
    /// nothing is run, when too many wait already.
    #[must_use]
    pub fn run(self: &Arc<Self>, pool: &Pool, call: u64, job: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.state();
        if state.in_work < self.at_a_time {
            state.in_work += 1;
            drop(state);
            self.start(pool, Box::new(job));
            return true;
        }
        let mut gone = VecDeque::new();
        if state.waiting.len() >= MOST_WAITING {
            let (left, others) =
                std::mem::take(&mut state.waiting).into_iter().partition(|one| (self.is_waiting)(one.call));
            (state.waiting, gone) = (left, others);
        }
        let has_room = state.waiting.len() < MOST_WAITING;
        if has_room {
            state.waiting.push_back(Waiting { call, job: Box::new(job) });
        }
        // What a job holds goes with it, and is no business of this lock's.
        drop(state);
        drop(gone);
        has_room
    }

    /// Takes `call` out if it still waits for its turn: it has its answer.
    pub fn give_up(&self, call: u64) {
        let mut state = self.state();
        let place = state.waiting.iter().position(|waiting| waiting.call == call);
        let waiting = place.and_then(|place| state.waiting.remove(place));
        drop(state);
        drop(waiting);
    }

    fn start(self: &Arc<Self>, pool: &Pool, job: Job) {
        let turn = Turn { of: Arc::clone(self), pool: pool.clone() };
        pool.run(move || {
            let _turn = turn;
            job();
        });
    }

    /// The next job that somebody waits for; without one, there is one less in work.
    fn next(&self) -> Option<Job> {
        loop {
            let mut state = self.state();
            let Some(next) = state.waiting.pop_front() else {
                state.in_work -= 1;
                return None;
            };
            drop(state);
            if (self.is_waiting)(next.call) {
                return Some(next.job);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hands the turn on when it is dropped, also when the job panicked.
struct Turn {
    of: Arc<Turns>,
    pool: Pool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(job) = self.of.next() {
            self.of.start(&self.pool, job);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    /// Turns for `at_a_time` calls, of which those up to 999 still wait for their answer.
    fn turns(at_a_time: usize) -> Arc<Turns> {
        Turns::new(at_a_time, |call| call < 1000)
    }

    /// A job that waits until the returned sender is dropped.
    fn held() -> (mpsc::Sender<()>, impl FnOnce() + Send) {
        let (release, released) = mpsc::channel::<()>();
        (release, move || assert!(released.recv().is_err()))
    }

    #[test]
    fn calls_take_turns_in_their_order() {
        let (turns, pool) = (turns(2), Pool::new(8));
        let (held, job) = held();
        assert!(turns.run(&pool, 0, job));
        let (done, finished) = mpsc::channel();
        for call in 1..100 {
            let done = done.clone();
            assert!(turns.run(&pool, call, move || done.send(call).unwrap()));
        }
        let calls: Vec<u64> = (1..100).map(|_| finished.recv_timeout(LONG).unwrap()).collect();
        assert_eq!(calls, (1..100).collect::<Vec<_>>());
        drop(held);
    }

    #[test]
    fn so_many_are_worked_on_and_so_many_wait() {
        let (turns, pool) = (turns(3), Pool::new(8));
        let (started, starts) = mpsc::channel();
        let held: Vec<_> = (0..3)
            .map(|call| {
                let ((held, job), started) = (held(), started.clone());
                assert!(turns.run(&pool, call, move || {
                    started.send(()).unwrap();
                    job();
                }));
                held
            })
            .collect();
        for _ in 0..3 {
            starts.recv_timeout(LONG).unwrap();
        }
        let waiting =
            |from: u64| (from..from + MOST_WAITING as u64).filter(|call| turns.run(&pool, *call, || ())).count();
        assert_eq!((waiting(3), waiting(300)), (MOST_WAITING, 0));
        turns.give_up(4);
        turns.give_up(4);
        assert_eq!((waiting(300), waiting(600)), (1, 0));
        assert_eq!(turns.state().in_work, 3);
        drop(held);
    }

    #[test]
    fn whom_nobody_waits_for_any_more_makes_room_and_is_not_worked_on() {
        let (turns, pool) = (turns(1), Pool::new(8));
        let (held, job) = held();
        assert!(turns.run(&pool, 0, job));
        for call in 1000..1000 + MOST_WAITING as u64 {
            assert!(turns.run(&pool, call, || panic!("nobody waits for this")));
        }
        let (done, finished) = mpsc::channel();
        assert!(turns.run(&pool, 1, move || done.send(()).unwrap()));
        assert_eq!(turns.state().waiting.len(), 1);
        assert!(turns.run(&pool, 1000, || panic!("nobody waits for this")));
        drop(held);
        finished.recv_timeout(LONG).unwrap();
        while turns.state().in_work > 0 {
            std::thread::yield_now();
        }
        assert!(turns.state().waiting.is_empty());
    }

    #[test]
    fn a_panic_hands_the_turn_on() {
        let (turns, pool) = (turns(1), Pool::new(1));
        let (held, job) = held();
        assert!(turns.run(&pool, 0, job));
        assert!(turns.run(&pool, 1, || panic!("on purpose")));
        let (done, finished) = mpsc::channel();
        assert!(turns.run(&pool, 2, move || done.send(()).unwrap()));
        drop(held);
        // The next thread starts once the pool is told of another job.
        let end = std::time::Instant::now() + LONG;
        while finished.try_recv().is_err() {
            assert!(std::time::Instant::now() < end, "the turn was lost");
            pool.run(|| ());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
