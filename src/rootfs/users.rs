//! Users and groups by name, looked up in the image's own passwd(5) and group(5).

/// A user or group that can't be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// No such user.
    #[error("user {0:?} is not in the image's /etc/passwd")]
    User(String),
    /// No such group.
    #[error("group {0:?} is not in the image's /etc/group")]
    Group(String),
}

/// Numbers for the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

fn passwd_lines(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Passwd { name, uid, gid })
    })
}

fn group_lines(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Resolves `name`, `uid`, `name:group`, `uid:gid` and their mixtures; empty is root. A number needs no entry, a name
/// does. Supplementary groups are those that list the user, unless a group is named (docker's rule).
///
/// # Errors
/// When a name is unknown.
pub fn resolve(user: &str, passwd: &str, group: &str) -> Result<Ids, UserError> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A number is always one, even if an image has a user of that name: who forces `1000` must not get root.
    let (uid, gid, name) = match number(user) {
        Some(uid) => {
            let entry = passwd_lines(passwd).find(|entry| entry.uid == uid);
            (uid, entry.as_ref().map_or(0, |entry| entry.gid), entry.map_or("", |entry| entry.name))
        }
        None => {
            let entry = passwd_lines(passwd).find(|entry| entry.name == user);
            let entry = entry.ok_or_else(|| UserError::User(user.to_owned()))?;
            (entry.uid, entry.gid, entry.name)
        }
    };
    match wanted_group {
        Some(wanted) => Ok(Ids { uid, gid: self::group(wanted, group)?, groups: Vec::new() }),
        None => {
            let lists = |members: &str| !name.is_empty() && members.split(',').any(|member| member.trim() == name);
            let groups = group_lines(group).filter(|(_, _, members)| lists(members)).map(|(_, gid, _)| gid);
            Ok(Ids { uid, gid, groups: groups.collect() })
        }
    }
}

/// Resolves a group's name or number.
///
/// # Errors
/// When a name is unknown.
pub fn group(wanted: &str, group: &str) -> Result<u32, UserError> {
    let known = || group_lines(group).find(|(name, _, _)| *name == wanted).map(|(_, gid, _)| gid);
    number(wanted).or_else(known).ok_or_else(|| UserError::Group(wanted.to_owned()))
}

/// An id. Docker's limit: beyond it there is (uid_t)-1, which means "leave as it is" to the kernel.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= i32::MAX.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001::/:/bin/sh\nbroken\n77:x:5:6::/:\n";
    const GROUP: &str = "root:x:0:\nuser:x:1001:\nextra:x:2000:user,other\n";

    #[test]
    fn users_are_found_the_way_docker_finds_them() {
        let resolve = |user| resolve(user, PASSWD, GROUP);
        assert_eq!(resolve(""), Ok(Ids::default()));
        assert_eq!(resolve("user"), Ok(Ids { uid: 1000, gid: 1001, groups: vec![2000] }));
        assert_eq!(resolve("1000"), Ok(Ids { uid: 1000, gid: 1001, groups: vec![2000] }));
        assert_eq!(resolve("4242"), Ok(Ids { uid: 4242, gid: 0, groups: vec![] }));
        assert_eq!(resolve("user:extra"), Ok(Ids { uid: 1000, gid: 2000, groups: vec![] }));
        assert_eq!(resolve("4242:4243"), Ok(Ids { uid: 4242, gid: 4243, groups: vec![] }));
        assert_eq!(resolve("77"), Ok(Ids { uid: 77, gid: 0, groups: vec![] }), "a number, though a user is called so");
        assert_eq!(resolve("4294967295"), Err(UserError::User("4294967295".to_owned())), "(uid_t)-1");
        assert_eq!(resolve("nobody"), Err(UserError::User("nobody".to_owned())));
        assert_eq!(resolve("user:none"), Err(UserError::Group("none".to_owned())));
    }

    proptest! {
        #[test]
        fn no_file_panics(user in ".*", passwd in ".*", group in ".*") {
            let _ = super::resolve(&user, &passwd, &group);
        }
    }
}
