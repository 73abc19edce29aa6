//! The table.

use std::fmt;
use std::time::Duration;

/// One line of the table.
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// Its value.
    pub value: Measured,
    /// What it is held against, and the value of that.
    pub compared: (String, Measured),
    /// What is aimed at.
    pub aim: Aim,
}

/// A measured value.
#[derive(Clone, Copy)]
pub struct Measured {
    value: Quantity,
    /// How far apart the quartiles of repeated measurements are.
    spread: Duration,
}

#[derive(Clone, Copy)]
enum Quantity {
    Time(Duration),
    Bytes(u64),
}

/// What a figure should be.
pub enum Aim {
    /// Nothing in particular: the line explains another one.
    None,
    /// At most this much more than what it is compared with.
    Over(Duration),
    /// As `Over`, on real hardware: an emulated machine cannot tell.
    OverUnlessEmulated(Duration),
    /// Less than what it is compared with.
    Below,
    /// At most this much.
    AtMost(u64),
    /// At most so many bytes more than what it is compared with.
    MoreBytes(u64),
    /// At most this long.
    Within(Duration),
}

const HEADER: [&str; 9] =
    ["figure", "measured", "compared with", "measured", "difference", "ratio", "spread", "aim", ""];

/// Prints `figures` as one table.
pub fn print(figures: &[Figure]) {
    let mut lines = vec![HEADER.map(str::to_owned)];
    lines.extend(figures.iter().map(Figure::cells));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADER.len()).map(width).collect();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate();
        // Words begin at the left, numbers end at the right.
        let padded = cells.map(|(column, (cell, &width))| match column {
            1 | 3 | 4 | 5 | 6 => format!("{cell:>width$}"),
            _ => format!("{cell:<width$}"),
        });
        println!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    }
}

impl Figure {
    fn cells(&self) -> [String; 9] {
        let compared = &self.compared.1;
        let (value, compared, spread) = (self.value.value, compared.value, self.value.spread.max(compared.spread));
        let difference = value.number() - compared.number();
        let met = match self.aim {
            Aim::None | Aim::OverUnlessEmulated(_) => None,
            // A machine that is busier than the aim is small cannot tell; nothing in front of a program
            // makes it faster.
            Aim::Over(most) if spread > most || difference < 0.0 => return self.with_result(difference, "unclear"),
            Aim::Over(most) => Some(difference <= Quantity::Time(most).number()),
            Aim::Below => Some(difference < 0.0),
            Aim::Within(most) => Some(value.number() <= Quantity::Time(most).number()),
            Aim::MoreBytes(most) => Some(difference <= Quantity::Bytes(most).number()),
            Aim::AtMost(most) => Some(value.number() <= Quantity::Bytes(most).number()),
        };
        self.with_result(difference, met.map_or("", |met| if met { "ok" } else { "missed" }))
    }

    fn with_result(&self, difference: f64, result: &str) -> [String; 9] {
        let (name, compared) = &self.compared;
        let (value, spread) = (self.value.value, self.value.spread.max(compared.spread));
        let spread = if spread.is_zero() { String::new() } else { value.written(spread.as_nanos() as f64) };
        [
            self.what.clone(),
            value.to_string(),
            name.clone(),
            compared.value.to_string(),
            format!("{}{}", if difference < 0.0 { "-" } else { "+" }, value.written(difference.abs())),
            format!("{:.2}", value.number() / compared.value.number()),
            spread,
            self.aim.to_string(),
            result.to_owned(),
        ]
    }
}

impl Measured {
    /// A time, and how far apart the quartiles of its measurements are.
    pub fn time(median: Duration, spread: Duration) -> Self {
        Measured { value: Quantity::Time(median), spread }
    }

    /// An amount of memory, measured once.
    pub fn bytes(bytes: u64) -> Self {
        Measured { value: Quantity::Bytes(bytes), spread: Duration::ZERO }
    }
}

impl Quantity {
    /// In nanoseconds or bytes.
    fn number(self) -> f64 {
        match self {
            Quantity::Time(time) => time.as_nanos() as f64,
            Quantity::Bytes(bytes) => bytes as f64,
        }
    }

    /// `number` in a unit that suits this quantity.
    fn written(self, number: f64) -> String {
        match self {
            Quantity::Time(time) if time < Duration::from_micros(900) => format!("{:.1} µs", number / 1e3),
            Quantity::Time(time) if time < Duration::from_secs(1) => format!("{:.2} ms", number / 1e6),
            Quantity::Time(_) => format!("{:.2} s", number / 1e9),
            Quantity::Bytes(_) => format!("{:.1} MiB", number / f64::from(1 << 20)),
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written(self.number()))
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Aim::None => Ok(()),
            Aim::Over(most) => write!(f, "at most +{most:?}"),
            Aim::OverUnlessEmulated(most) => write!(f, "(at most +{most:?} if not emulated)"),
            Aim::Below => f.write_str("less"),
            Aim::Within(most) => write!(f, "at most {most:?}"),
            Aim::MoreBytes(most) => write!(f, "at most +{}", Quantity::Bytes(*most)),
            Aim::AtMost(most) => write!(f, "at most {}", Quantity::Bytes(*most)),
        }
    }
}
