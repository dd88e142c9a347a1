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
	// known is what this Writer has put on disk.
	known map[Scope]map[group]onDisk
}

// onDisk is what a record was when it was written.
type onDisk struct {
	content [sha256.Size]byte // the checksum of what it holds, but for the time
	file    stamp
	start   time.Time // of the machine, by the clock that dated it
}

// stamp changes with everything that can be done to a file.
type stamp struct {
	inode   uint64
	size    int64
	changed syscall.Timespec
}

// Open makes the folder, if it is not there, closes it to others, locks it, and sweeps what a writer before has left unfinished.
// What it has finished stays.
func Open(dir string) (*Writer, error) {
	w := &Writer{dir: dir, clock: systemClock, known: map[Scope]map[group]onDisk{}}
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
		errs = append(errs, w.lock.Close())
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

// Set has a scope hold these entries and no others; none is an answer, too. Of two entries for one key the last counts. Records
// that are there as they were written are not written again. Skipped is how many entries no record can hold: their keys are
// none, or they are too large; what was there for the host of one that is too large stays. After an error what was there before
// is there still, or part of it is new.
func (w *Writer) Set(scope Scope, entries []Entry) (skipped int, err error) {
	skipped, err = w.set(scope, entries)
	return skipped, w.told(err)
}

func (w *Writer) set(scope Scope, entries []Entry) (skipped int, err error) {
	folder, err := scope.folder()
	if err != nil {
		return 0, err
	}
	if err := w.intact(); err != nil {
		return 0, err
	}
	now, err := w.now()
	if err != nil {
		return 0, err
	}
	if err := w.makeFolder(scope, folder); err != nil {
		return 0, err
	}
	groups, masks, skipped := grouped(entries)
	var failed error // the first: on a full disk there is one for each record
	for g, written := range groups {
		err := w.put(scope, record{Scope: folder, Group: g, Written: now, Entries: written})
		switch {
		case errors.Is(err, errSize):
			skipped += len(written)
		case failed == nil:
			failed = err
		}
	}
	if failed != nil {
		return skipped, failed
	}
	// The index comes after them, so that whoever finds it finds all; and before what is not meant to be there any more goes, so
	// that whoever misses that finds another index.
	if err := w.put(scope, record{Scope: folder, Group: indexGroup, Written: now, Masks: masks, Generation: generationOf(groups)}); err != nil {
		return skipped, err
	}
	return skipped, w.drop(scope, folder, func(g group) bool { _, ok := groups[g]; return ok || g == indexGroup })
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

// makeFolder makes the folder of a scope, also in the place of what is none.
func (w *Writer) makeFolder(scope Scope, folder string) error {
	info, err := w.root.Lstat(folder)
	if err == nil && ours(info.Sys().(*syscall.Stat_t), syscall.S_IFDIR) != nil {
		err = errors.Join(w.root.RemoveAll(folder), fs.ErrNotExist)
	}
	if errors.Is(err, fs.ErrNotExist) {
		w.known[scope] = nil
		err = w.root.Mkdir(folder, 0o700)
	}
	if w.known[scope] == nil {
		w.known[scope] = map[group]onDisk{}
	}
	return err
}

// put writes a record, unless it is on disk as this Writer has left it, dated by the same clock.
func (w *Writer) put(scope Scope, r record) error {
	undated := r
	undated.Written = instant{}
	raw, err := json.Marshal(undated)
	if err != nil {
		return errors.New("a record cannot be encoded") // the error might quote it
	}
	name, content, start := path.Join(r.Scope, string(r.Group)), sha256.Sum256(raw), r.Written.Wall.Add(-r.Written.Boot)
	if was, ok := w.known[scope][r.Group]; ok && was.content == content && start.Sub(was.start).Abs() <= clockTolerance {
		if there, err := w.stampOf(name); err == nil && there == was.file {
			return nil
		}
	}
	file, err := encode(r)
	if err != nil {
		return err
	}
	if err := w.replace(r.Scope, name, file); err != nil {
		return err
	}
	there, err := w.stampOf(name)
	if err != nil {
		return err
	}
	w.known[scope][r.Group] = onDisk{content, there, start}
	return nil
}

func (w *Writer) stampOf(name string) (stamp, error) {
	info, err := w.root.Lstat(name)
	if err != nil {
		return stamp{}, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	return stamp{stat.Ino, stat.Size, stat.Ctim}, nil
}

// replace puts a file in the place of another, or of whatever else there is, at once.
func (w *Writer) replace(folder, name string, content []byte) (err error) {
	unfinished := path.Join(folder, temporary+rand.Text())
	f, err := w.root.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = w.root.Remove(unfinished)
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync() // a tmpfs has nothing to do for it
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	err = w.root.Rename(unfinished, name)
	if errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.EEXIST) { // a folder is no record
		err = w.root.RemoveAll(name)
		if err == nil {
			err = w.root.Rename(unfinished, name)
		}
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
			delete(w.known[scope], g)
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
	delete(w.known, scope)
	// The index goes first, so that nobody takes what is left for all.
	if err = w.root.RemoveAll(path.Join(folder, string(indexGroup))); err == nil {
		err = w.root.RemoveAll(folder)
	}
	return w.told(err)
}
