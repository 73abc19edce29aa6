//! What two patterns have in common, exactly: both are walked at the same time, a byte a step, as automata.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Instant;

use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::start;
use regex_automata::{Anchored, MatchKind};

use super::pattern::Pattern;

/// The most memory that one automaton may take, in bytes, and its states again as many.
const AUTOMATON_LIMIT: usize = 1 << 20;
/// How many automata are kept.
const MOST_AUTOMATA: usize = 64;
/// How many pairs of states are looked at for one pair of patterns.
const MOST_STATES: usize = 20_000;
/// After how many of them the time is looked at.
const STATES_AT_A_TIME: usize = 64;

/// How what two patterns match is related. What could not be found out is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Relation {
    /// A shortest text that both match, if there is one.
    pub(super) common: Option<Option<String>>,
    /// Whether the first matches every text that the second does.
    pub(super) covers: Option<bool>,
}

/// Whether the empty text counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Empty {
    Counts,
    /// No text that is matched is ever empty.
    Never,
}

/// Compares patterns until a given time.
pub(super) struct Comparer<'a> {
    end: Instant,
    automata: HashMap<&'a str, Option<Rc<Automaton>>>,
    relations: HashMap<(&'a str, &'a str, Empty), Relation>,
}

impl<'a> Comparer<'a> {
    pub(super) fn until(end: Instant) -> Self {
        Comparer { end, automata: HashMap::new(), relations: HashMap::new() }
    }

    /// Goes on until `end`.
    pub(super) fn go_on_until(&mut self, end: Instant) {
        self.end = end;
    }

    /// Whether there is time left.
    pub(super) fn has_time(&self) -> bool {
        Instant::now() < self.end
    }

    /// How two patterns are related.
    pub(super) fn relation(&mut self, first: &'a Pattern, second: &'a Pattern, empty: Empty) -> Relation {
        let key = (first.source(), second.source(), empty);
        if let Some(relation) = self.relations.get(&key) {
            return relation.clone();
        }
        let mut relation = self.walk(key.0, key.1, empty);
        if key.0 == key.1 {
            relation.covers = Some(true);
        }
        if self.has_time() {
            self.relations.insert(key, relation.clone());
        }
        relation
    }

    fn walk(&mut self, first: &'a str, second: &'a str, empty: Empty) -> Relation {
        if !self.has_time() {
            return Relation::default();
        }
        match (self.automaton(first), self.automaton(second)) {
            (Some(first), Some(second)) => Walk::new(&first, &second, empty).finish(self.end),
            _ => Relation::default(),
        }
    }

    fn automaton(&mut self, source: &'a str) -> Option<Rc<Automaton>> {
        if self.automata.len() >= MOST_AUTOMATA {
            self.automata.clear();
        }
        self.automata.entry(source).or_insert_with(|| Automaton::new(source).map(Rc::new)).clone()
    }
}

/// A pattern as an automaton that makes its states when they are first reached.
///
/// regex-automata's automata whose states are all made at once would do as well. But they are a feature that
/// regex itself then uses too, in every program: each rule would take more memory.
struct Automaton {
    dfa: DFA,
    cache: RefCell<Cache>,
    start: LazyStateID,
}

impl Automaton {
    /// Nothing if it would be too large, or has to know of Unicode's words (`\b`).
    fn new(source: &str) -> Option<Self> {
        let nfa = thompson::Config::new().nfa_size_limit(Some(AUTOMATON_LIMIT)).which_captures(WhichCaptures::None);
        let states = DFA::config()
            .match_kind(MatchKind::All)
            .cache_capacity(AUTOMATON_LIMIT)
            // States keep their numbers until the cache is full; then it is given up.
            .minimum_cache_clear_count(Some(0));
        let dfa = DFA::builder().thompson(nfa).configure(states).build(&format!(r"\A(?:{source})\z")).ok()?;
        let mut cache = dfa.create_cache();
        let start = dfa.start_state(&mut cache, &start::Config::new().anchored(Anchored::Yes)).ok()?;
        Some(Automaton { dfa, cache: RefCell::new(cache), start })
    }

    fn next(&self, state: LazyStateID, byte: u8) -> Option<LazyStateID> {
        self.dfa.next_state(&mut self.cache.borrow_mut(), state, byte).ok()
    }

    /// Whether a text that leads to `state` is matched.
    fn accepts(&self, state: LazyStateID) -> Option<bool> {
        Some(self.dfa.next_eoi_state(&mut self.cache.borrow_mut(), state).ok()?.is_match())
    }
}

/// All texts that the second automaton may match, the shortest first.
struct Walk<'a> {
    first: &'a Automaton,
    second: &'a Automaton,
    empty: Empty,
    places: Vec<Place>,
    common: Option<String>,
    beyond: bool,
}

/// Where a text leads to.
struct Place {
    first: LazyStateID,
    second: LazyStateID,
    /// The place before, and the byte from there.
    before: Option<(usize, u8)>,
}

impl<'a> Walk<'a> {
    fn new(first: &'a Automaton, second: &'a Automaton, empty: Empty) -> Self {
        let places = vec![Place { first: first.start, second: second.start, before: None }];
        Walk { first, second, empty, places, common: None, beyond: false }
    }

    fn finish(mut self, end: Instant) -> Relation {
        let finished = self.run(end).is_some();
        Relation {
            common: (finished || self.common.is_some()).then_some(self.common),
            covers: (finished || self.beyond).then_some(!self.beyond),
        }
    }

    /// Nothing if it could not be walked to the end.
    fn run(&mut self, end: Instant) -> Option<()> {
        let bytes = self.bytes();
        let mut seen = HashSet::new();
        let mut index = 0;
        while index < self.places.len() && !(self.beyond && self.common.is_some()) {
            if index % STATES_AT_A_TIME == 0 && Instant::now() >= end || self.places.len() > MOST_STATES {
                return None;
            }
            let Place { first, second, .. } = self.places[index];
            if index > 0 || self.empty == Empty::Counts {
                self.arrive(index)?;
            }
            for &byte in &bytes {
                let (first, second) = (self.first.next(first, byte)?, self.second.next(second, byte)?);
                let leads_nowhere = second.is_dead() || first.is_dead() && self.beyond;
                if !leads_nowhere && seen.insert((first, second)) {
                    self.places.push(Place { first, second, before: Some((index, byte)) });
                }
            }
            index += 1;
        }
        Some(())
    }

    fn arrive(&mut self, index: usize) -> Option<()> {
        let Place { first, second, .. } = self.places[index];
        if self.second.accepts(second)? {
            match self.first.accepts(first)? {
                true if self.common.is_none() => self.common = Some(self.text(index)),
                true => {}
                false => self.beyond = true,
            }
        }
        Some(())
    }

    fn text(&self, index: usize) -> String {
        let mut bytes = Vec::new();
        let mut place = &self.places[index];
        while let Some((before, byte)) = place.before {
            bytes.push(byte);
            place = &self.places[before];
        }
        bytes.reverse();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// One byte for all those that neither automaton tells apart, those first that read well.
    fn bytes(&self) -> Vec<u8> {
        let readable = (b'a'..=b'z').chain(b'0'..=b'9').chain(b'!'..=b'~');
        let mut seen = HashSet::new();
        let classes = |byte| (self.first.dfa.byte_classes().get(byte), self.second.dfa.byte_classes().get(byte));
        readable.chain(0..=u8::MAX).filter(|&byte| seen.insert(classes(byte))).collect()
    }
}

#[cfg(test)]
mod tests;
