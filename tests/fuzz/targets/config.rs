//! The configuration file, any text: one line that says what is wrong, or a configuration that explains itself and
//! decides on any device for any domain, the same way each time.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use volcrypt::domain::{Facts, Nobody, Requester};
use volcrypt::policy::{Config, Decision, Outcome};
use volcrypt::volume::Identity;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    pieces: Vec<Piece<'a>>,
    target: &'a str,
    lun: u8,
    wwid: Option<&'a str>,
    domain: Option<&'a str>,
    owner: Option<&'a str>,
}

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Known(u8),
    Text(&'a str),
}

/// What valid files are made of. A rule alone would take a fuzzer very long to find.
const KNOWN: [&str; 67] = [
    "[[rules]]\nname = 'a'\niscsi_target = '(?<id>.*)'\n",
    "[[rules]]\nname = 'b'\nwwid = '(?<id>.+)'\n",
    "[[rules]]\n",
    "name = ",
    "action = ",
    "iscsi_target = ",
    "wwid = ",
    "dm_uuid = ",
    "volume_id = ",
    "profile = ",
    "lun = ",
    "domain = ",
    "owner = ",
    "create_keys = ",
    "'protect'\n",
    "'pass'\n",
    "'deny'\n",
    "true\n",
    "false\n",
    "0\n",
    "1\n",
    "-1\n",
    "9223372036854775807\n",
    "[policy]\n",
    "unmatched_iscsi = ",
    "export_keys = ",
    "plaintext_targets = ",
    "[hook]\n",
    "deadline = ",
    "when_daemon_unreachable = ",
    "'refuse'\n",
    "'start-unprotected'\n",
    "other_emulators = ",
    "'start'\n",
    "[daemon]\n",
    "open_deadline = ",
    "qemu_users = ",
    "['a', 'b']\n",
    "[key_manager]\n",
    "type = ",
    "'embedded'\n",
    "'key-file'\n",
    "directory = ",
    "file = ",
    "'/x'\n",
    "[key_cache]\n",
    "lifetime_days = ",
    "[audit]\n",
    "when_unwritable = ",
    "[guard]\n",
    "enabled = ",
    "cgroup = ",
    "[profiles.default]\n",
    "[profiles.\"a\\nb\"]\n",
    "cipher = ",
    "key_size = ",
    "provider = ",
    "sector_size = ",
    "4096\n",
    "\"${id}\"\n",
    "\"${id}-${lun}\"\n",
    "\"${a\\nb}\"\n",
    "'(?<id>[0-9a-f-]{36})'\n",
    "'((a{9}){9}){9}'\n",
    "\"a\\u0000\\nb\"\n",
    "\"\"\"\n\n\"\"\"\n",
    "\n",
];

fuzz_target!(|input: Input<'_>| {
    let text: String = input
        .pieces
        .iter()
        .map(|piece| match piece {
            Piece::Known(number) => KNOWN[usize::from(*number) % KNOWN.len()],
            Piece::Text(text) => text,
        })
        .collect();
    let config = match Config::parse(&text, "FILE") {
        Ok(config) => config,
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("FILE:") && !error.contains(char::is_control), "{error:?}");
            return;
        }
    };
    let explained = config.explain();
    assert!(!explained.contains(|character: char| character.is_control() && character != '\n'), "{explained:?}");
    assert_eq!(Config::parse(&text, "FILE").expect("the same text").explain(), explained);

    let mut device = Identity::of_iscsi_unit(input.target, input.lun.into());
    device.wwid = input.wwid.map(str::to_owned);
    let facts =
        input.domain.map(|name| Facts { name: name.to_owned(), uuid: None, owner: input.owner.map(str::to_owned) });
    let requester: &dyn Requester = facts.as_ref().map_or(&Nobody, |facts| facts);
    let traced = config.trace(&device, requester).outcome;
    match (config.decide(&device, requester), traced) {
        (Decision::Pass, Outcome::NotProtected) => {}
        (Decision::Protect(protection), Outcome::Protected { volume, .. }) => assert_eq!(protection.volume, volume),
        (Decision::Refuse(refusal), Outcome::Refused { sentence }) => {
            assert_eq!(refusal.to_string(), sentence);
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
        }
        (decision, traced) => panic!("{decision:?} is not {traced:?}"),
    }
});
