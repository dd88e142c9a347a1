package nodecache

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Errors of a Writer.
var (
	// ErrLocked says that another process writes the folder.
	ErrLocked = errors.New("another agent writes it")
	// ErrLost says that the folder, or its lock, was moved, removed or opened to others: the Writer is of no use any more, and
	// what is to be in the folder has to be written by another one.
	ErrLost = errors.New("the folder is not the one any more that was opened")
	// ErrRemoved says that the folder was removed where it is mounted from: no process that has the mount can bring it back.
	ErrRemoved = errors.New("the folder was removed under its mount")
)

const (
	lockName = "lock"
	// temporary starts the names of files that are not finished.
	temporary = "t-"
	// clockTolerance is how much the clocks may differ, of the machine and a better one, or of now and when a record was
	// written, before it matters.
	clockTolerance = 10 * time.Second
)

// Writer writes records. It is the only one of its folder, as long as it is open. It is not safe for concurrent use.
type Writer struct {
	dir   string
	root  *os.Root
	lock  *os.File
	clock clock
	// better is how far a better clock than that of the machine is ahead of the time since the start; zero where there is none.
	better time.Duration
	// known is what this Writer has put on disk. shared says where each content is: the records of all scopes that hold it are one
	// file, since a resource gives many namespaces the same, and a tmpfs is memory.
	known  map[Scope]map[group]onDisk
	shared map[checksum]holders
}

type checksum [sha256.Size]byte

// holders are those that hold a content: how many, and the last of them.
type holders struct {
	count int
	last  Scope
}

// onDisk is what a record was when it was written.
type onDisk struct {
	content checksum // of what it holds, but for the time
	file    stamp
	start   time.Time // of the machine, by the clock that dated it
}

// stamp changes with all that happens to files by accident. (The time of the last change of the inode does so with its links, too.)
type stamp struct {
	inode    uint64
	size     int64
	modified syscall.Timespec
	mode     uint32
	owner    uint32
}

// Open makes the folder, if it is not there, closes it to others, locks it, and sweeps what a writer before has left unfinished.
// What it has finished stays.
func Open(dir string) (*Writer, error) {
	w := &Writer{dir: dir, clock: systemClock, known: map[Scope]map[group]onDisk{}, shared: map[checksum]holders{}}
	if err := w.open(); err != nil {
		_ = w.Close()
		return nil, w.told(err)
	}
	return w, nil
}

// told is an error as it is told: of the folder, and without the names of files, some of which are new each time.
func (w *Writer) told(err error) error {
	if err == nil {
		return nil
	}
	var ofPath *fs.PathError
	var ofLink *os.LinkError
	switch {
	case errors.As(err, &ofPath):
		err = fmt.Errorf("%s: %w", ofPath.Op, ofPath.Err)
	case errors.As(err, &ofLink):
		err = fmt.Errorf("%s: %w", ofLink.Op, ofLink.Err)
	}
	return fmt.Errorf("node cache %s: %w", w.dir, err)
}

func (w *Writer) open() error {
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	if err := closeToOthers(w.dir); err != nil {
		return err
	}
	var err error
	if w.root, err = os.OpenRoot(w.dir); err != nil {
		return err
	}
	if w.lock, err = w.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE|syscall.O_NONBLOCK, 0o600); err != nil {
		return err
	}
	if err := setLock(w.lock.Fd()); err != nil {
		if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) {
			return ErrLocked
		}
		return err
	}
	if err := w.intact(); err != nil {
		return err
	}
	return w.sweep()
}

// closeToOthers has a folder that is ours be ours alone. Whoever made it may have left it open, as kubelets do for a hostPath.
func closeToOthers(dir string) error {
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0) //nolint:gosec // the folder is the caller's
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return errors.New("it must be a folder, and no symbolic link")
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	switch stat := info.Sys().(*syscall.Stat_t); {
	case stat.Nlink == 0:
		return ErrRemoved
	case int(stat.Uid) != os.Geteuid():
		return fmt.Errorf("it belongs to user %d, and must to user %d", stat.Uid, os.Geteuid())
	}
	return f.Chmod(0o700)
}

// intact returns ErrLost where others than this Writer's readers may find another folder, or another writer, in its place.
func (w *Writer) intact() error {
	folder, err := os.Lstat(w.dir) //nolint:gosec // the folder is the caller's
	if err != nil {
		return ErrLost
	}
	opened, err := w.root.Stat(".")
	if err != nil || !os.SameFile(folder, opened) || opened.Sys().(*syscall.Stat_t).Nlink == 0 || ours(folder.Sys().(*syscall.Stat_t), syscall.S_IFDIR) != nil {
		return ErrLost
	}
	locked, err := w.lock.Stat()
	if err != nil {
		return ErrLost
	}
	if there, err := w.root.Lstat(lockName); err != nil || !os.SameFile(there, locked) {
		return ErrLost
	}
	return nil
}

// Close gives the folder up. The records stay.
func (w *Writer) Close() error {
	var errs []error
	if w.lock != nil {
		errs = append(errs, endLock(w.lock.Fd()), w.lock.Close())
	}
	if w.root != nil {
		errs = append(errs, w.root.Close())
	}
	return errors.Join(errs...)
}

// sweep removes what is not finished.
func (w *Writer) sweep() error {
	return fs.WalkDir(w.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasPrefix(d.Name(), temporary) {
			err = w.root.Remove(name)
		}
		return err
	})
}

// SetTime tells the Writer what a clock says now that is better than that of the machine, as that of a server is. Records are
// dated by it where the machine's is behind: its readers would take what has expired for good.
func (w *Writer) SetTime(now time.Time) {
	if t, err := w.clock(); err == nil {
		w.better = now.Sub(time.Unix(0, 0)) - t.Boot
	}
}

// now is the time that records are dated by.
func (w *Writer) now() (instant, error) {
	t, err := w.clock()
	if better := time.Unix(0, 0).Add(w.better + t.Boot); better.Sub(t.Wall) > clockTolerance {
		t.Wall = better
	}
	return t, err
}

// Scopes returns those that have a folder, whoever wrote it.
func (w *Writer) Scopes() ([]Scope, error) {
	err := w.intact()
	var entries []fs.DirEntry
	if err == nil {
		entries, err = fs.ReadDir(w.root.FS(), ".")
	}
	if err != nil {
		return nil, w.told(err)
	}
	var scopes []Scope
	for _, e := range entries {
		scope := Node
		if namespace, ok := strings.CutPrefix(e.Name(), "ns-"); ok {
			scope = InNamespace(namespace)
		}
		if folder, err := scope.folder(); err == nil && folder == e.Name() {
			scopes = append(scopes, scope)
		}
	}
	return scopes, nil
}

// Holds reports whether a scope is on disk as this Writer has left it, dated by the same clock.
func (w *Writer) Holds(scope Scope) bool {
	folder, err := scope.folder()
	now, clockErr := w.now()
	if err != nil || clockErr != nil || w.intact() != nil || !w.isFolder(folder) {
		return false
	}
	for g := range w.known[scope] {
		if !w.isThere(scope, path.Join(folder, string(g)), g, now.start()) {
			return false
		}
	}
	_, ok := w.known[scope][indexGroup]
	return ok
}

// Set has a scope hold these entries and no others; none is an answer, too. Of two entries for one key the last counts. Records
// that are there as they were written are not written again. Skipped is how many entries no record can hold: their keys are
// none, or they are too large; what was there for the host of one that is too large stays. After an error each host has what it
// had, what it should have, or, where it should have nothing, that.
func (w *Writer) Set(scope Scope, entries []Entry) (skipped int, err error) {
	return w.write(scope, entries, true)
}

// Add does the same, and leaves the records of hosts that have no entry.
func (w *Writer) Add(scope Scope, entries []Entry) (skipped int, err error) {
	return w.write(scope, entries, false)
}

func (w *Writer) write(scope Scope, entries []Entry, only bool) (skipped int, err error) {
	folder, err := scope.folder()
	if err == nil {
		err = w.intact()
	}
	var now instant
	if err == nil {
		now, err = w.now()
	}
	if err == nil {
		err = w.makeFolder(scope, folder)
	}
	if err != nil {
		return 0, w.told(err)
	}
	groups, masks, skipped := grouped(entries)
	wanted := func(g group) bool { _, ok := groups[g]; return ok || g == indexGroup }
	if !only {
		// What stays has to be found, whatever its shape.
		index, _ := w.index(folder)
		masks = slices.Compact(slices.Sorted(slices.Values(append(masks, index.Masks...))))
		wanted = func(group) bool { return true }
	}
	index := record{Scope: folder, Group: indexGroup, Written: now, Masks: masks, Generation: generationOf(groups)}
	put := func() (large int, err error) {
		for g, written := range groups {
			putErr := w.put(scope, folder, record{Group: g, Written: now, Entries: written})
			switch {
			case errors.Is(putErr, errSize):
				large += len(written)
			case err == nil: // the first: on a full disk there is one for each record
				err = putErr
			}
		}
		if err == nil {
			// The index comes after them, so that whoever finds it finds all; and before what is not meant to be there any more
			// goes, so that whoever misses that finds another index.
			err = w.put(scope, folder, index)
		}
		return large, err
	}
	large, err := put()
	dropErr := w.drop(scope, folder, wanted)
	if errors.Is(err, syscall.ENOSPC) {
		// What was taken back takes effect, even so; and there may be room now.
		large, err = put()
	}
	if err == nil {
		err = dropErr
	}
	return skipped + large, w.told(err)
}

// index returns that of a scope.
func (w *Writer) index(folder string) (record, error) {
	raw, err := w.root.ReadFile(path.Join(folder, string(indexGroup)))
	if err != nil {
		return record{}, err
	}
	return decode(raw, folder, indexGroup)
}

// grouped returns the entries of each group, the masks of those with globs, and the number of entries that no group takes.
func grouped(entries []Entry) (groups map[group][]writtenEntry, masks []string, skipped int) {
	last := make(map[string]Entry, len(entries))
	for _, e := range entries {
		last[e.Key] = e
	}
	groups = map[group][]writtenEntry{}
	for _, key := range slices.Sorted(maps.Keys(last)) {
		g, mask, err := groupOf(key)
		if err != nil {
			skipped++
			continue
		}
		if mask != "" && !slices.Contains(masks, mask) {
			masks = append(masks, mask)
		}
		e := last[key]
		written := writtenEntry{Key: key, Username: e.Username.Reveal(), Password: e.Password.Reveal()}
		if !e.Expires.IsZero() {
			written.Expires = &e.Expires
		}
		groups[g] = append(groups[g], written)
	}
	slices.Sort(masks)
	return groups, masks, skipped
}

// generationOf names a set of groups.
func generationOf(groups map[group][]writtenEntry) string {
	hash := sha256.New()
	for _, g := range slices.Sorted(maps.Keys(groups)) {
		hash.Write([]byte(g))
	}
	return hex.EncodeToString(hash.Sum(nil)[:8])
}

// isFolder reports whether a scope's folder is one, and ours alone.
func (w *Writer) isFolder(folder string) bool {
	info, err := w.root.Lstat(folder)
	return err == nil && ours(info.Sys().(*syscall.Stat_t), syscall.S_IFDIR) == nil
}

// makeFolder makes the folder of a scope, also in the place of what is none.
func (w *Writer) makeFolder(scope Scope, folder string) error {
	if w.isFolder(folder) {
		if w.known[scope] == nil {
			w.known[scope] = map[group]onDisk{}
		}
		return nil
	}
	w.forget(scope)
	w.known[scope] = map[group]onDisk{}
	if err := w.root.RemoveAll(folder); err != nil {
		return err
	}
	return w.root.Mkdir(folder, 0o700)
}

// put writes a record, unless it is on disk as this Writer has left it, dated by the same clock.
func (w *Writer) put(scope Scope, folder string, r record) error {
	undated := r
	undated.Written = instant{}
	raw, err := json.Marshal(undated)
	if err != nil {
		return errors.New("a record cannot be encoded") // the error might quote it
	}
	name, content, start := path.Join(folder, string(r.Group)), checksum(sha256.Sum256(raw)), r.Written.start()
	if w.known[scope][r.Group].content == content && w.isThere(scope, name, r.Group, start) {
		return nil
	}
	written, ok := w.link(scope, name, r.Group, content, start)
	if !ok {
		file, err := encode(r)
		if err != nil {
			return err
		}
		if err := w.replace(folder, name, func(unfinished string) error { return w.create(unfinished, file) }); err != nil {
			return err
		}
		there, err := w.stampOf(name)
		if err != nil {
			return err
		}
		written = onDisk{content, there, start}
	}
	w.forgetRecord(scope, r.Group)
	w.known[scope][r.Group] = written
	w.shared[content] = holders{w.shared[content].count + 1, scope}
	return nil
}

// isThere reports whether a record is on disk as this Writer has left it, dated by a clock that says the same.
func (w *Writer) isThere(scope Scope, name string, g group, start time.Time) bool {
	was, ok := w.known[scope][g]
	if !ok || start.Sub(was.start).Abs() > clockTolerance {
		return false
	}
	there, err := w.stampOf(name)
	return err == nil && there == was.file
}

// link makes a record the same file as that of another scope which holds the same; false where there is none.
func (w *Writer) link(scope Scope, name string, g group, content checksum, start time.Time) (onDisk, bool) {
	other, ok := w.shared[content]
	folder, err := other.last.folder()
	if !ok || err != nil || other.last == scope {
		return onDisk{}, false
	}
	theirs := path.Join(folder, string(g))
	its := w.known[other.last][g]
	if its.content != content || !w.isThere(other.last, theirs, g, start) {
		return onDisk{}, false
	}
	// The same file would be renamed to itself, and its other name stay.
	if there, err := w.stampOf(name); err == nil && there == its.file {
		return its, true
	}
	return its, w.replace(path.Dir(name), name, func(unfinished string) error { return w.root.Link(theirs, unfinished) }) == nil
}

// forgetRecord forgets what a record of a scope holds.
func (w *Writer) forgetRecord(scope Scope, g group) {
	was, ok := w.known[scope][g]
	if !ok {
		return
	}
	delete(w.known[scope], g)
	if other := w.shared[was.content]; other.count > 1 {
		w.shared[was.content] = holders{other.count - 1, other.last}
	} else {
		delete(w.shared, was.content)
	}
}

// forget forgets a scope.
func (w *Writer) forget(scope Scope) {
	for g := range w.known[scope] {
		w.forgetRecord(scope, g)
	}
	delete(w.known, scope)
}

func (w *Writer) stampOf(name string) (stamp, error) {
	info, err := w.root.Lstat(name)
	if err != nil {
		return stamp{}, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	return stamp{stat.Ino, stat.Size, stat.Mtim, stat.Mode, stat.Uid}, nil
}

// create makes a file.
func (w *Writer) create(name string, content []byte) error {
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync() // a tmpfs has nothing to do for it
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	return err
}

// replace puts a file that finish makes in the place of another, or of whatever else there is, at once.
func (w *Writer) replace(folder, name string, finish func(unfinished string) error) error {
	unfinished := path.Join(folder, temporary+rand.Text())
	err := finish(unfinished)
	if err == nil {
		err = w.root.Rename(unfinished, name)
	}
	if errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.EEXIST) { // a folder is no record
		if err = w.root.RemoveAll(name); err == nil {
			err = w.root.Rename(unfinished, name)
		}
	}
	if err != nil {
		_ = w.root.Remove(unfinished)
	}
	return err
}

// drop removes what is not to be kept.
func (w *Writer) drop(scope Scope, folder string, keep func(group) bool) error {
	files, err := fs.ReadDir(w.root.FS(), folder)
	if err != nil {
		return err
	}
	var failed error
	for _, f := range files {
		if g := group(f.Name()); !keep(g) {
			if err := w.root.RemoveAll(path.Join(folder, f.Name())); failed == nil {
				failed = err
			}
			w.forgetRecord(scope, g)
		}
	}
	return failed
}

// Remove has a scope forgotten.
func (w *Writer) Remove(scope Scope) error {
	folder, err := scope.folder()
	if err == nil {
		err = w.intact()
	}
	if err != nil {
		return w.told(err)
	}
	w.forget(scope)
	// The index goes first, so that nobody takes what is left for all.
	if err = w.root.RemoveAll(path.Join(folder, string(indexGroup))); err == nil {
		err = w.root.RemoveAll(folder)
	}
	return w.told(err)
}
