//! Device-mapper's devices, and multipath maps among them.

use super::attributes::{Node, entries};
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, Iscsi, Mapping};

impl Node<'_> {
    /// The two names, if this is one of device-mapper's devices.
    pub(super) fn mapping(&self) -> Result<Option<Mapping>, Refusal> {
        let Some(name) = self.text("dm/name")? else { return Ok(None) };
        Ok(Some(Mapping { name, uuid: self.text("dm/uuid")?.unwrap_or_default() }))
    }

    /// The multipath map that has taken this disk for a path.
    pub(super) fn path_of(&self) -> Result<Option<Mapping>, Refusal> {
        for holder in entries(&self.directory.join("holders"), self.device)? {
            let node = Node { directory: &holder, device: self.device };
            if let Some(mapping) = node.mapping()?.filter(Mapping::is_multipath) {
                return Ok(Some(mapping));
            }
        }
        Ok(None)
    }
}

/// Makes a multipath map known by what its paths have in common.
///
/// Portals always differ, and an array may show one volume under several targets. The WWID is what tells
/// volumes apart; without one, only target and LUN together do.
pub(super) fn agree(map: &mut Identity) -> Result<(), Refusal> {
    let Some((first, others)) = map.underlying.split_first() else {
        let sentence = format!(
            "the multipath map {map} has no path, so it cannot be told which volume it is: 'multipath -ll' shows it; \
             log in to its target again"
        );
        return Err(Refusal::new(Reason::DeviceGone, sentence));
    };
    let same_target = others.iter().all(|path| path.iscsi_target() == first.iscsi_target());
    let same_portal = others.iter().all(|path| path.iscsi == first.iscsi);
    let same_lun = others.iter().all(|path| path.lun == first.lun);
    let same = |path: &Identity| match &first.wwid {
        Some(_) => path.wwid == first.wwid,
        None => path.wwid.is_none() && path.iscsi_target() == first.iscsi_target() && path.lun == first.lun,
    };
    if let Some(other) = others.iter().find(|path| !same(path)) {
        let sentence = format!(
            "the paths of the multipath map {map} do not lead to one volume: {first} is {}, and {other} is {}; nothing is \
             written to it, run 'multipath -ll' and mend the map",
            unit(first),
            unit(other)
        );
        return Err(Refusal::new(Reason::ForeignData, sentence));
    }
    map.wwid = first.wwid.clone();
    map.lun = first.lun.filter(|_| same_lun);
    let portal = |iscsi: &Iscsi| iscsi.portal.clone().filter(|_| same_portal);
    let iscsi = first.iscsi.as_ref().filter(|_| same_target);
    map.iscsi = iscsi.map(|iscsi| Iscsi { target: iscsi.target.clone(), portal: portal(iscsi) });
    Ok(())
}

/// What a path leads to, in words.
fn unit(path: &Identity) -> String {
    let parts = [
        path.wwid.as_ref().map(|wwid| format!("WWID {wwid:?}")),
        path.lun.map(|lun| format!("LUN {lun}")),
        path.iscsi_target().map(|target| format!("target {target:?}")),
    ];
    let known: Vec<String> = parts.into_iter().flatten().collect();
    if known.is_empty() { "not told by the kernel".to_owned() } else { known.join(", ") }
}
