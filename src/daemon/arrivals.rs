use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How many connections may be silent at a time.
const MOST: usize = 256;
/// How long a connection may be silent. A wrapper has sent its one message within a millisecond or so; one of a test's
/// may be slower.
pub const MESSAGE_DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 30 } else { 5 });

/// A connection that has said nothing yet.
#[derive(Debug)]
pub struct Arrival {
    /// The connection.
    pub stream: UnixStream,
    /// The process that made it.
    pub pid: u32,
    /// The control group of that process, which no guest can leave: it is the same for all that a QEMU starts.
    group: String,
    since: Instant,
}

impl Arrival {
    /// A connection that process `pid` has just made.
    pub fn new(stream: UnixStream, pid: u32) -> Self {
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        Arrival { stream, pid, group, since: Instant::now() }
    }
}

/// The connections that have said nothing yet, the oldest first. No thread waits for any of them, and there
/// are never too many.
#[derive(Debug, Default)]
pub struct Arrivals(Vec<Arrival>);

impl Arrivals {
    /// All of them.
    pub fn list(&self) -> &[Arrival] {
        &self.0
    }

    /// Takes in one more. What there is too much then is given back, and the sentence that says why: what a
    /// process has beyond one, or else the oldest of the control group that has most.
    pub fn add(&mut self, arrival: Arrival) -> Option<(Arrival, &'static str)> {
        if self.0.iter().any(|earlier| earlier.pid == arrival.pid) {
            return Some((arrival, "an earlier connection of it has not said anything yet"));
        }
        self.0.push(arrival);
        if self.0.len() <= MOST {
            return None;
        }
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for arrival in &self.0 {
            *counts.entry(&arrival.group).or_default() += 1;
        }
        let most = counts.values().max().copied()?;
        let surplus = self.0.iter().position(|arrival| counts.get(arrival.group.as_str()) == Some(&most))?;
        Some((self.0.remove(surplus), "too many connections have not said anything yet"))
    }

    /// Takes out those at which `spoke` is true, in the order of [`Self::list`].
    pub fn take(&mut self, spoke: &[bool]) -> Vec<Arrival> {
        let mut spoke = spoke.iter();
        self.0.extract_if(.., |_| spoke.next().is_some_and(|spoke| *spoke)).collect()
    }

    /// Takes out those that were silent for too long.
    pub fn take_late(&mut self, now: Instant) -> Vec<Arrival> {
        self.0.extract_if(.., |arrival| now.saturating_duration_since(arrival.since) >= MESSAGE_DEADLINE).collect()
    }

    /// When the next one was silent for too long.
    pub fn next_late(&self) -> Option<Instant> {
        self.0.first().map(|oldest| oldest.since + MESSAGE_DEADLINE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(pid: u32, group: &str) -> Arrival {
        let (stream, _) = UnixStream::pair().unwrap();
        Arrival { stream, pid, group: group.to_owned(), since: Instant::now() }
    }

    #[test]
    fn a_process_has_one_and_the_control_group_with_most_makes_room() {
        let mut arrivals = Arrivals::default();
        assert!(arrivals.add(arrival(1, "honest")).is_none());
        assert_eq!(arrivals.add(arrival(1, "honest")).unwrap().0.pid, 1);
        assert_eq!(arrivals.list().len(), 1);
        let hostile = 1000..2000;
        let dropped: Vec<u32> =
            hostile.filter_map(|pid| arrivals.add(arrival(pid, "hostile"))).map(|dropped| dropped.0.pid).collect();
        assert_eq!(dropped, (1000..1000 + 1001 - MOST as u32).collect::<Vec<_>>(), "the oldest of them");
        assert_eq!(arrivals.add(arrival(2, "honest")).unwrap().0.group, "hostile");
        assert_eq!(arrivals.list().len(), MOST);
        assert_eq!(arrivals.list().iter().filter(|arrival| arrival.group == "honest").count(), 2);
    }

    #[test]
    fn who_speaks_and_who_is_late_is_taken_out() {
        let mut arrivals = Arrivals::default();
        for pid in 0..4 {
            assert!(arrivals.add(arrival(pid, "")).is_none());
        }
        let pids = |arrivals: &[Arrival]| arrivals.iter().map(|arrival| arrival.pid).collect::<Vec<_>>();
        assert_eq!(pids(&arrivals.take(&[false, true, false, true])), [1, 3]);
        assert_eq!(pids(arrivals.list()), [0, 2]);
        let late = arrivals.next_late().unwrap();
        assert!(arrivals.take_late(late - Duration::from_secs(1)).is_empty());
        assert_eq!(pids(&arrivals.take_late(late + Duration::from_secs(1))), [0, 2]);
        assert_eq!(arrivals.next_late(), None);
    }
}
