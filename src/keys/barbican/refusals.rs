//! What is said of an answer that did not come, or was no.

use super::BarbicanKeyManager;
use super::answer::{Answered, NoAnswer};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// What was asked about.
#[derive(Clone, Copy)]
pub enum About<'a> {
    /// No volume in particular.
    NoVolume,
    /// The key of a volume, whichever secret it is.
    Volume(&'a VolumeId),
    /// A new key of a volume.
    NewKey(&'a VolumeId),
    /// The key of a volume, which is the secret with this id.
    Secret(&'a VolumeId, &'a str),
    /// The secret with this id, which somebody else has made and which is the key of a volume.
    Foreign(&'a VolumeId, &'a str),
}

impl About<'_> {
    fn what(self) -> String {
        match self {
            About::NoVolume => "the keys".to_owned(),
            About::Volume(volume) => format!("the key of volume {volume}"),
            About::NewKey(volume) => format!("a new key of volume {volume}"),
            About::Secret(volume, id) => format!("the key of volume {volume} (secret {id})"),
            About::Foreign(volume, id) => format!("Cinder's secret {id}, the key of volume {volume}"),
        }
    }
}

impl BarbicanKeyManager {
    /// The refusal that follows from `no_answer`.
    pub(super) fn refusal(&self, about: About<'_>, no_answer: NoAnswer) -> Refusal {
        let what = about.what();
        let (reason, sentence) = match no_answer {
            NoAnswer::Refused(answered) => return self.refused(about, &answered),
            NoAnswer::TokenRefused(answered) => {
                // Keystone, which decides that, has let this host in.
                return self.refusal(about, NoAnswer::NoToken(answered)).as_hearsay();
            }
            NoAnswer::NoToken(answered) => {
                let sentence = format!(
                    "Keystone does not accept this host, which asked for {what} ({answered}): see that auth_url is Keystone's, \
                     that the application credential is valid, and that {} holds its secret",
                    self.client.config().secret.display()
                );
                (Reason::NotAllowed, sentence)
            }
            NoAnswer::Malformed(reason) => {
                let sentence = format!(
                    "an answer about {what} makes no sense ({reason}): have the administrator of Keystone and Barbican look at \
                     it"
                );
                (Reason::KeyManager, sentence)
            }
            NoAnswer::Unreachable(reason) => {
                return Refusal::unanswered(format!(
                    "{what} could not be asked for ({reason}): see that Keystone and Barbican run and can be reached from here"
                ));
            }
            NoAnswer::Local(sentence) => (Reason::Configuration, sentence),
            NoAnswer::Refusal(refusal) => return refusal,
        };
        Refusal::new(reason, sentence)
    }

    fn refused(&self, about: About<'_>, answered: &Answered) -> Refusal {
        let what = about.what();
        let (user, barbican) = self.client.who_and_where();
        match (answered.status, about) {
            (403, About::Secret(_, id) | About::Foreign(_, id)) => Refusal::new(
                Reason::NotAllowed,
                format!(
                    "Barbican refuses this host {what} ({answered}): have its owner run 'openstack acl user add --user {user} \
                     --operation-type read {barbican}/secrets/{id}'"
                ),
            ),
            (403, _) => Refusal::new(
                Reason::NotAllowed,
                format!(
                    "Barbican refuses this host {what} ({answered}): have the project's administrator look at the roles of \
                     user {user} and at the project's quota"
                ),
            ),
            (404, About::Secret(volume, _)) => self.no_key(volume),
            (404, About::Foreign(volume, id)) => Refusal::new(
                Reason::NoKey,
                format!(
                    "Barbican has no secret {id}, which is the key of volume {volume}: Cinder deletes it with its volume; if the \
                     volume is still there, have the secret restored, or see that its UUID is right"
                ),
            ),
            (502 | 504, _) => self.refusal(about, NoAnswer::Unreachable(format!("{barbican}: {answered}"))),
            _ => Refusal::new(
                Reason::KeyManager,
                format!(
                    "Barbican at {barbican} does not give this host {what} ({answered}): have its administrator look into \
                     its log"
                ),
            ),
        }
    }

    /// The refusal for a volume that has no key.
    pub(super) fn no_key(&self, volume: &VolumeId) -> Refusal {
        Refusal::new(
            Reason::NoKey,
            format!(
                "Barbican has no key of volume {volume} in this host's project: if the volume was enrolled, have the key \
                 restored, or see that this host's application credential is of the right project"
            ),
        )
    }
}
