//! Two hosts that destroy old keys in opposite directions at the same time, in every order of what they ask the two
//! key managers.

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

const NAME: &str = "v";
/// The key managers in a circle. None of them is this host's database, whatever it is called.
const PLACES: [ManagerKind; 3] = [ManagerKind::Kmip, ManagerKind::Barbican, ManagerKind::Embedded];
const THERE: Route = Route { from: PLACES[0], to: PLACES[1] };
const BACK: Route = Route { from: PLACES[1], to: PLACES[0] };

/// Lets hosts ask one question at a time, in an order that is tried after another.
struct Turns {
    /// Which host is about to ask something; none for one that has ended.
    arrive: Sender<Option<usize>>,
    go: Vec<Mutex<Receiver<()>>>,
}

/// What a host does not live to see: it ends at this question, which the server hears if the other is true.
#[derive(Clone, Copy, Debug)]
struct Death {
    host: usize,
    question: usize,
    is_heard: bool,
}

/// A server as a host asks it.
struct Asked<'a> {
    server: &'a Server,
    turns: &'a Turns,
    host: usize,
    death: Option<Death>,
    questions: &'a AtomicUsize,
}

impl Asked<'_> {
    /// What a host asks between its first question and its mark changes nothing for the other, so that takes no turn.
    fn ask<T>(&self, is_mark: bool, question: impl FnOnce(&Server) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let takes_turn = self.questions.load(Ordering::SeqCst) != 1 || is_mark;
        let number = match takes_turn {
            true => self.questions.fetch_add(1, Ordering::SeqCst),
            false => return question(self.server),
        };
        let death = self.death.filter(|death| death.host == self.host && number >= death.question);
        if death.is_some_and(|death| number > death.question) {
            return Err(Server::dead());
        }
        self.turns.arrive.send(Some(self.host)).unwrap();
        self.turns.go[self.host].lock().unwrap().recv().unwrap();
        match death {
            None => question(self.server),
            Some(Death { is_heard, .. }) => {
                if is_heard {
                    let _ = question(self.server);
                }
                Err(Server::dead())
            }
        }
    }
}

impl KeyManager for Asked<'_> {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.ask(false, |server| server.get(volume))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.ask(false, |server| server.get_enrolled(key))
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.ask(false, |server| server.create(volume, wanted))
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        self.ask(false, |server| server.import(volume, key, description))
    }

    fn capabilities(&self) -> Capabilities {
        self.server.capabilities()
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.ask(false, |server| server.described(volume))
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.ask(false, |server| server.destroy(volume))
    }

    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        self.ask(false, |server| server.leaving(volume))
    }

    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        self.ask(true, |server| server.note_leaving(volume, leaving))
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.ask(false, Server::list)
    }
}

/// Of each key manager, whether it has the key, and the mark.
type Left = Vec<(bool, Option<String>)>;

/// Hosts and the route of each, with the key of one volume in both key managers.
struct World {
    hosts: Vec<(Host, Route)>,
    servers: [Server; 3],
}

impl World {
    fn new(routes: &[Route]) -> Self {
        let mut made = Host::with_volumes(0);
        made.enrol(NAME, 512);
        let hosts: Vec<_> = routes.iter().map(|&route| (made.after_power_cut(), route)).collect();
        for (host, route) in &hosts {
            host.store.plan_copies(*route, &[id(NAME)]).unwrap();
        }
        World { hosts, servers: Default::default() }
    }

    /// All have the key again, and none a mark.
    fn begin_anew(&self) {
        for (place, server) in PLACES.iter().zip(&self.servers) {
            server.marks.lock().unwrap().clear();
            server.keys.lock().unwrap().clear();
            if !self.hosts.iter().any(|(_, route)| route.from == *place) {
                continue;
            }
            server.put(NAME, &self.hosts[0].0.keys[NAME], description(NAME, 512, Some("p1")));
        }
    }

    fn pair<T>(&self, route: Route, mut asked: impl FnMut(usize) -> T) -> (T, T) {
        let place = |kind| PLACES.iter().position(|place| *place == kind).unwrap();
        (asked(place(route.from)), asked(place(route.to)))
    }

    /// All hosts at once, in the order that `choices` begin; they go on with what was chosen. Returns how many there were
    /// to choose from each time.
    fn run(&self, choices: &mut Vec<usize>, death: Option<Death>) -> (Vec<usize>, Vec<Result<(), Refusal>>) {
        let (arrive, arrived) = channel();
        let (gone, go): (Vec<_>, Vec<_>) = self.hosts.iter().map(|_| channel()).unzip();
        let turns = Turns { arrive, go: go.into_iter().map(Mutex::new).collect() };
        let turns = &turns;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.hosts.len())
                .map(|number| {
                    scope.spawn(move || {
                        let (host, route) = &self.hosts[number];
                        let questions = &AtomicUsize::new(0);
                        let asked = |place: usize| Asked {
                            server: &self.servers[place],
                            turns,
                            host: number,
                            death,
                            questions,
                        };
                        let (source, target) = self.pair(*route, asked);
                        let name = called(&format!("host{number}"));
                        let pair: (&dyn KeyManager, &dyn KeyManager) = (&source, &target);
                        let migration = KeyMigration::new(&host.store, &host.locks, *route, pair, name).unwrap();
                        let outcome = migration.remove(&id(NAME)).map(drop);
                        turns.arrive.send(None).unwrap();
                        outcome
                    })
                })
                .collect();
            let (mut asking, mut busy, mut options) = (Vec::new(), threads.len(), Vec::new());
            loop {
                while busy > 0 {
                    if let Some(host) = arrived.recv().unwrap() {
                        asking.push(host);
                    }
                    busy -= 1;
                }
                if asking.is_empty() {
                    break;
                }
                asking.sort_unstable();
                if choices.len() == options.len() {
                    choices.push(0);
                }
                let chosen = choices[options.len()] % asking.len();
                options.push(asking.len());
                gone[asking.remove(chosen)].send(()).unwrap();
                busy = 1;
            }
            (options, threads.into_iter().map(|thread| thread.join().unwrap()).collect())
        })
    }

    /// How many of them have the key.
    fn copies(&self) -> usize {
        let has_it =
            |server: &&Server| server.get(&id(NAME)).is_ok_and(|key| key.bytes() == self.hosts[0].0.keys[NAME]);
        self.servers.iter().filter(has_it).count()
    }

    /// Which of them have the key, and the marks.
    fn left(&self) -> Left {
        let one = |server: &Server| {
            let mark = server.marks.lock().unwrap().get(&id(NAME)).map(ToString::to_string);
            (!server.keys.lock().unwrap().is_empty(), mark)
        };
        self.servers.iter().map(one).collect()
    }

    /// Makes it so again.
    fn leave(&self, left: &Left) {
        self.begin_anew();
        for (server, (has_key, mark)) in self.servers.iter().zip(left) {
            if !has_key {
                server.keys.lock().unwrap().clear();
            }
            let mark = mark.iter().map(|mark| (id(NAME), Leaving::parse(mark)));
            *server.marks.lock().unwrap() = mark.collect();
        }
    }

    /// What one host does alone.
    fn alone(&self, number: usize, aim: Aim) -> Result<(), Refusal> {
        self.on(number, self.hosts[number].1, aim)
    }

    /// The same with another route.
    fn on(&self, number: usize, route: Route, aim: Aim) -> Result<(), Refusal> {
        let host = &self.hosts[number].0;
        let (source, target) = self.pair(route, |place| &self.servers[place]);
        let name = called(&format!("host{number}"));
        let migration = KeyMigration::new(&host.store, &host.locks, route, (source, target), name)?;
        match aim {
            Aim::Copy => migration.copy(&id(NAME)).map(drop),
            Aim::DestroyOld => migration.remove(&id(NAME)).map(drop),
        }
    }

    /// Every order there is. Returns how many, and which numbers of hosts came through.
    fn in_every_order(&self, death: Option<Death>, check: impl Fn(&[Result<(), Refusal>])) -> (usize, BTreeSet<usize>) {
        let (mut choices, mut orders, mut through) = (Vec::new(), 0, BTreeSet::new());
        loop {
            self.begin_anew();
            let (options, outcomes) = self.run(&mut choices, death);
            orders += 1;
            through.insert(outcomes.iter().filter(|outcome| outcome.is_ok()).count());
            assert!(self.copies() > 0, "both are lost: {choices:?}, {death:?}");
            check(&outcomes);
            while choices.last().is_some_and(|&last| last + 1 == options[choices.len() - 1]) {
                choices.pop();
            }
            match choices.last_mut() {
                Some(last) => *last += 1,
                None => return (orders, through),
            }
        }
    }
}

fn marks(world: &World) -> usize {
    world.servers.iter().map(|server| server.marks.lock().unwrap().len()).sum()
}

#[test]
fn no_order_of_two_hosts_that_move_a_key_in_opposite_directions_loses_both_copies() {
    let world = World::new(&[THERE, BACK]);
    let (orders, through) = world.in_every_order(None, |outcomes| {
        let refusals: Vec<String> =
            outcomes.iter().filter_map(|outcome| Some(outcome.as_ref().err()?.to_string())).collect();
        let is_told = |refusal: &String| {
            refusal.contains("has begun to destroy the key of volume v in")
                || refusal.contains("has no key of volume v any more")
        };
        assert!(!refusals.is_empty() && refusals.iter().all(is_told), "{refusals:?}");
        assert_eq!(world.copies(), refusals.len(), "{refusals:?}");
        assert_eq!(marks(&world), 0, "a mark is left");
    });
    assert_eq!(through, BTreeSet::from([0, 1]), "how many came through");
    assert!(orders > 500, "{orders}");
}

#[test]
fn a_host_that_ends_at_any_question_loses_no_copy_and_can_go_on() {
    let world = World::new(&[THERE, BACK]);
    let (mut orders, seen) = (0, RefCell::new(BTreeSet::new()));
    for question in 0..7 {
        for is_heard in [false, true] {
            let death = Death { host: 0, question, is_heard };
            let ended = |_: &[Result<(), Refusal>]| {
                let left = world.left();
                for first in [0, 1] {
                    // What comes next goes by what is left alone.
                    if !seen.borrow_mut().insert((left.clone(), first)) {
                        continue;
                    }
                    world.leave(&left);
                    for number in [first, 1 - first, first] {
                        let _ = world.alone(number, Aim::DestroyOld);
                        assert!(world.copies() > 0, "{death:?}, then host {number} alone");
                    }
                    if marks(&world) > 0 {
                        // The other copy had gone before: now this one is to stay.
                        world.on(0, BACK, Aim::Copy).unwrap();
                    }
                    assert_eq!((world.copies(), marks(&world)), (1, 0), "{death:?}, then host {first} first");
                }
            };
            orders += world.in_every_order(Some(death), ended).0;
        }
    }
    println!("{orders} orders, {} ends", seen.borrow().len());
}

#[test]
fn the_host_that_has_set_a_mark_takes_it_back_when_the_key_is_to_stay() {
    let world = World::new(&[THERE, BACK]);
    let mark = |host: &str, is_asked| {
        world.begin_anew();
        let leaving = Leaving { host: called(host), is_asked };
        world.servers[1].note_leaving(&id(NAME), Some(&leaving)).unwrap();
    };
    // Host 1 has begun to move the key away from where host 0 moves it to.
    mark("host1", false);
    let refusal = world.alone(0, Aim::DestroyOld).unwrap_err();
    assert_eq!(refusal.reason(), Reason::NotAllowed);
    assert_eq!(
        refusal.to_string(),
        "host host1 has begun to destroy the key of volume v in barbican, so nothing was destroyed here: have 'volcrypt key \
         migrate --from barbican --to kmip --destroy-old' come to its end on host host1, or run 'volcrypt key migrate --from \
         kmip --to barbican' there if the key is to stay in barbican"
    );
    // Nor does it count as copied for any host but that one.
    let refusal = world.alone(0, Aim::Copy).unwrap_err();
    assert!(refusal.to_string().contains("so it does not count as copied: have"), "{refusal}");
    world.on(1, THERE, Aim::Copy).unwrap();
    assert_eq!(marks(&world), 0);
    world.alone(0, Aim::Copy).unwrap();
    world.alone(0, Aim::DestroyOld).unwrap();
    assert_eq!(world.copies(), 1);
    // What may have been asked for may come about yet.
    mark("host1", true);
    let refusal = world.on(1, THERE, Aim::Copy).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "this host has begun to destroy the key of volume v in barbican, so it does not count as copied: have 'volcrypt key \
         migrate --from barbican --to kmip --destroy-old' come to its end on this host"
    );
    world.alone(1, Aim::DestroyOld).unwrap();
    assert_eq!((world.copies(), marks(&world)), (1, 0));
    // Another host that moves the key in the same direction leaves it to the one that has begun.
    mark("elsewhere", false);
    let refusal = world.alone(1, Aim::DestroyOld).unwrap_err();
    assert!(refusal.to_string().starts_with("host elsewhere has begun to destroy"), "{refusal}");
    assert_eq!((world.copies(), marks(&world)), (2, 1));
}

#[test]
fn no_circle_of_three_key_managers_loses_all_copies() {
    let around = |from: usize| Route { from: PLACES[from], to: PLACES[(from + 1) % 3] };
    let world = World::new(&[around(0), around(1), around(2)]);
    // All orders are too many: some hundred of them, as the numbers fall.
    let mut number = 1_u64;
    for _ in 0..400 {
        world.begin_anew();
        let mut choices: Vec<usize> = (0..40)
            .map(|_| {
                number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (number >> 33) as usize
            })
            .collect();
        world.run(&mut choices, None);
        assert!(world.copies() > 0, "all are lost: {choices:?}");
    }
}
