//! Resolves the names of users and groups with the image's own passwd(5) and group(5).
//!
//! Ids are those of docker (moby/sys, `user/user.go`): 0 to 2147483647, as Go's `Atoi` reads numbers, so `+5` and `007`
//! are numbers and `" 5"` is a name. Outside of that range lies (uid_t)-1, which means "leave as it is" to the kernel:
//! a process that should get this id would stay root. A text that looks like a number is never taken for a name
//! (CVE-2026-46680 in containerd: an image may have a user of that name with the id 0).

use std::collections::HashMap;

use crate::text::quoted;

/// The highest id. No system takes an id up to this one for a negative number.
const ID_MAX: u32 = i32::MAX.cast_unsigned();
/// The kernel's limit on supplementary groups (`NGROUPS_MAX`, setgroups(2)).
pub(crate) const GROUPS_MAX: usize = 65536;

/// A user or group that can't be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// The image has no such user.
    #[error("user {} is not in the image's /etc/passwd", quoted(.0))]
    User(String),
    /// The image has no such group.
    #[error("group {} is not in the image's /etc/group", quoted(.0))]
    Group(String),
    /// A number is outside of the range of ids.
    #[error("{kind} {}: uids and gids must be in range 0-{ID_MAX}", quoted(.number))]
    Number {
        /// `user` or `group`.
        kind: &'static str,
        /// The number, as it was given.
        number: String,
    },
    /// An entry of the image has a number outside of the range of ids.
    #[error(
        "{kind} {}: entry {} of the image's {file}: uids and gids must be in range 0-{ID_MAX}; use another user, or correct the image",
        quoted(.name), quoted(.entry)
    )]
    Entry {
        /// `user` or `group`.
        kind: &'static str,
        /// The name of the user or group.
        name: String,
        /// The entry's line.
        entry: String,
        /// The file that contains the entry.
        file: &'static str,
    },
    /// The user has more supplementary groups than a process can have.
    #[error("user {} has {count} groups by the image's /etc/group and group_add; the kernel accepts at most {GROUPS_MAX}", quoted(.name))]
    Groups {
        /// The user.
        name: String,
        /// The number of groups.
        count: usize,
    },
}

/// The numeric ids of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    /// The user's id.
    pub uid: u32,
    /// The primary group's id.
    pub gid: u32,
    /// The ids of supplementary groups.
    pub groups: Vec<u32>,
}

/// A text that was read as an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ParsedId {
    Id(u32),
    /// The text is a number outside of the range of ids.
    OutOfRange,
    /// The text is not a number.
    NotANumber,
}

impl ParsedId {
    fn of(text: &str) -> Self {
        let (negative, digits) = match text.strip_prefix(['+', '-']) {
            Some(digits) => (text.starts_with('-'), digits),
            None => (false, text),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::NotANumber;
        }
        match digits.parse::<u32>() {
            Ok(0) => Self::Id(0),
            Ok(id @ 1..=ID_MAX) if !negative => Self::Id(id),
            _ => Self::OutOfRange,
        }
    }
}

/// A line of passwd(5) whose ids are numbers. Other lines are ignored: docker would read an id that is not a number as
/// 0, which is root.
struct PasswdEntry<'a> {
    line: &'a str,
    name: &'a str,
    uid: ParsedId,
    gid: ParsedId,
}

fn passwd_lines(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = ParsedId::of(fields.nth(1)?);
        let gid = ParsedId::of(fields.next()?);
        (uid != ParsedId::NotANumber && gid != ParsedId::NotANumber).then_some(PasswdEntry { line, name, uid, gid })
    })
}

impl PasswdEntry<'_> {
    fn ids(&self) -> Result<(u32, u32), UserError> {
        match (self.uid, self.gid) {
            (ParsedId::Id(uid), ParsedId::Id(gid)) => Ok((uid, gid)),
            _ => Err(UserError::Entry {
                kind: "user",
                name: self.name.to_owned(),
                entry: self.line.to_owned(),
                file: "/etc/passwd",
            }),
        }
    }
}

/// A line of group(5) whose id is a number.
struct GroupEntry<'a> {
    line: &'a str,
    name: &'a str,
    gid: ParsedId,
    members: &'a str,
}

fn group_lines(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = ParsedId::of(fields.nth(1)?);
        let members = fields.next().unwrap_or_default();
        (gid != ParsedId::NotANumber).then_some(GroupEntry { line, name, gid, members })
    })
}

impl GroupEntry<'_> {
    fn id(&self) -> Result<u32, UserError> {
        match self.gid {
            ParsedId::Id(gid) => Ok(gid),
            ParsedId::OutOfRange | ParsedId::NotANumber => Err(UserError::Entry {
                kind: "group",
                name: self.name.to_owned(),
                entry: self.line.to_owned(),
                file: "/etc/group",
            }),
        }
    }
}

/// Resolves `name`, `uid`, `name:group`, `uid:gid` and other combinations of names and ids; an empty text is root. Only
/// names need an entry in the files. Unless `user` names a group, the supplementary groups are those whose entries list
/// the user (docker's rule).
///
/// # Errors
/// Fails when a name is unknown, or an id is out of range.
pub(crate) fn resolve_user(user: &str, passwd: &str, group: &str) -> Result<Ids, UserError> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A number is always an id, even if the image has a user of that name: an operator who forces `1000` must not get
    // root.
    let (uid, gid, name) = match ParsedId::of(user) {
        ParsedId::OutOfRange => return Err(UserError::Number { kind: "user", number: user.to_owned() }),
        ParsedId::Id(uid) => match passwd_lines(passwd).find(|entry| entry.uid == ParsedId::Id(uid)) {
            Some(entry) => (uid, entry.ids()?.1, entry.name),
            None => (uid, 0, ""),
        },
        ParsedId::NotANumber => {
            let entry = passwd_lines(passwd).find(|entry| entry.name == user);
            let entry = entry.ok_or_else(|| UserError::User(user.to_owned()))?;
            let (uid, gid) = entry.ids()?;
            (uid, gid, entry.name)
        }
    };
    if let Some(wanted) = wanted_group {
        return Ok(Ids { uid, gid: self::resolve_group(wanted, group)?, groups: Vec::new() });
    }
    let lists = |members: &str| !name.is_empty() && members.split(',').any(|member| member.trim() == name);
    let groups = group_lines(group).filter(|entry| lists(entry.members)).map(|entry| entry.id());
    Ok(Ids { uid, gid, groups: groups.collect::<Result<_, _>>()? })
}

/// Returns the home directory of a user by the image's passwd(5), as docker does: `/` for a user that has no entry or
/// no home directory.
pub(crate) fn home(uid: u32, passwd: &str) -> &str {
    let entry = passwd_lines(passwd).find(|entry| entry.uid == ParsedId::Id(uid));
    entry.and_then(|entry| entry.line.split(':').nth(5)).filter(|home| !home.is_empty()).unwrap_or("/")
}

/// Resolves a group's name or number.
///
/// # Errors
/// Fails when the name is unknown, or an id is out of range.
fn resolve_group(wanted: &str, group: &str) -> Result<u32, UserError> {
    id_of_group(wanted, |name| group_lines(group).find(|entry| entry.name == name).map(|entry| entry.id()))
}

/// Resolves the names and numbers of several groups, in their order. The file is parsed only once: the job chooses the
/// number of groups and the image the length of the file, so both may be large.
///
/// # Errors
/// Fails when a name is unknown, or an id is out of range.
pub(crate) fn resolve_groups(wanted: &[String], group: &str) -> Result<Vec<u32>, UserError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut known: HashMap<&str, GroupEntry<'_>> = HashMap::new();
    for entry in group_lines(group) {
        // The first entry of a name counts.
        known.entry(entry.name).or_insert(entry);
    }
    wanted.iter().map(|wanted| id_of_group(wanted, |name| known.get(name).map(GroupEntry::id))).collect()
}

fn id_of_group(wanted: &str, look_up: impl FnOnce(&str) -> Option<Result<u32, UserError>>) -> Result<u32, UserError> {
    match ParsedId::of(wanted) {
        ParsedId::Id(gid) => Ok(gid),
        ParsedId::OutOfRange => Err(UserError::Number { kind: "group", number: wanted.to_owned() }),
        ParsedId::NotANumber => look_up(wanted).unwrap_or_else(|| Err(UserError::Group(wanted.to_owned()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001::/:/bin/sh\nbroken\n77:x:5:6::/:\n";
    const GROUP: &str = "root:x:0:\nuser:x:1001:\nextra:x:2000:user,other\n";

    #[test]
    fn users_are_found_the_way_docker_finds_them() {
        let resolve = |user| resolve_user(user, PASSWD, GROUP);
        assert_eq!(resolve(""), Ok(Ids::default()));
        assert_eq!(resolve("user"), Ok(Ids { uid: 1000, gid: 1001, groups: vec![2000] }));
        assert_eq!(resolve("1000"), Ok(Ids { uid: 1000, gid: 1001, groups: vec![2000] }));
        assert_eq!(resolve("4242"), Ok(Ids { uid: 4242, gid: 0, groups: vec![] }));
        assert_eq!(resolve("user:extra"), Ok(Ids { uid: 1000, gid: 2000, groups: vec![] }));
        assert_eq!(resolve("4242:4243"), Ok(Ids { uid: 4242, gid: 4243, groups: vec![] }));
        assert_eq!(resolve("77"), Ok(Ids { uid: 77, gid: 0, groups: vec![] }), "a number, though a user has that name");
        assert_eq!(resolve("nobody"), Err(UserError::User("nobody".to_owned())));
        assert_eq!(resolve("user:none"), Err(UserError::Group("none".to_owned())));
    }

    #[test]
    fn every_user_has_a_home_directory() {
        for (uid, expected) in [(0, "/root"), (1000, "/"), (5, "/"), (4242, "/")] {
            assert_eq!(home(uid, PASSWD), expected, "{uid}");
        }
        assert_eq!(home(7, "seven:x:7:7::/home/seven:/bin/sh\n"), "/home/seven");
        assert_eq!(home(7, "seven:x:7:7\n"), "/");
    }

    #[test]
    fn numbers_are_read_as_docker_reads_them() {
        let uid = |text: &str| resolve_user(text, "", "").map(|ids| ids.uid);
        for (text, id) in [("+5", 5), ("007", 7), ("-0", 0), ("2147483647", 2_147_483_647)] {
            assert_eq!(uid(text), Ok(id), "{text}");
        }
        for text in
            ["-1", "2147483648", "4294967295", "4294967296", "99999999999999999999", "+2147483648", "-2147483648"]
        {
            assert_eq!(uid(text), Err(UserError::Number { kind: "user", number: text.to_owned() }));
            let error = resolve_group(text, "").expect_err("refused").to_string();
            assert!(error.contains(text) && error.contains("in range 0-2147483647"), "{error}");
        }
        // These are names, and no user has them.
        for text in [" 5", "5 ", "0x5", "5_0", "+", "-", "5.0"] {
            assert_eq!(uid(text), Err(UserError::User(text.to_owned())));
        }
        // containerd took a number that is too large for a name (CVE-2026-46680).
        assert!(matches!(resolve_user("4294967295", "4294967295:x:0:0::/:\n", ""), Err(UserError::Number { .. })));
    }

    #[test]
    fn entries_out_of_range_are_named() {
        let passwd = "evil:x:4294967295:0::/:\nneg:x:-1:0::/:\ngid:x:5:4294967295::/:\nlong:x:99999999999:0::/:\n\
                      text:x:zero:0::/:\nfine:x:9:9::/:\n";
        let group = "big:x:4294967295:fine\nother:x:4294967295:\nok:x:7:ok\n";
        for user in ["evil", "neg", "gid", "5", "long", "evil:7", "fine"] {
            let error = resolve_user(user, passwd, group).expect_err(user);
            let entry = if user == "fine" { "big:x:4294967295:fine" } else { passwd_line(passwd, user) };
            assert!(matches!(&error, UserError::Entry { entry: found, .. } if found == entry), "{user}: {error}");
        }
        assert_eq!(resolve_user("text", passwd, group), Err(UserError::User("text".to_owned())), "not root");
        assert!(matches!(super::resolve_group("big", group), Err(UserError::Entry { .. })));
        // Entries that are not used do no harm.
        assert_eq!(resolve_user("fine:ok", passwd, group), Ok(Ids { uid: 9, gid: 7, groups: vec![] }));
    }

    fn passwd_line<'a>(passwd: &'a str, user: &str) -> &'a str {
        let name = user.split(':').next().unwrap_or_default();
        let name = if name == "5" { "gid" } else { name };
        passwd.lines().find(|line| line.starts_with(&format!("{name}:"))).expect("a line")
    }

    proptest! {
        #[test]
        fn no_file_panics(user in ".*", passwd in ".*", group in ".*") {
            let _ = super::resolve_user(&user, &passwd, &group);
        }
    }
}
