package nodecache

import (
	"crypto/rand"
	"crypto/sha256"
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
)

// ErrLocked says that another process writes the folder.
var ErrLocked = errors.New("another agent writes the node cache")

const (
	lockName = "lock"
	// temporary starts the names of files that are not finished.
	temporary = "t-"
)

// Writer writes records. It is the only one of its folder, as long as it is open. It is not safe for concurrent use.
type Writer struct {
	dir   string
	root  *os.Root
	lock  *os.File
	clock clock
	// known is what this Writer has on disk: the checksum of the entries of each group.
	known map[Scope]map[group][sha256.Size]byte
}

// Open makes the folder, if it is not there, locks it, and sweeps what a writer before has left unfinished. What it has finished
// stays.
func Open(dir string) (*Writer, error) {
	w := &Writer{dir: dir, clock: systemClock, known: map[Scope]map[group][sha256.Size]byte{}}
	if err := w.open(); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("node cache %s: %w", dir, err)
	}
	return w, nil
}

func (w *Writer) open() error {
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	fd, err := openFolder(-1, w.dir) // which looks at it
	if err != nil {
		return err
	}
	_ = syscall.Close(fd)
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
	return w.sweep()
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

// Scopes returns those that have a folder, whoever wrote it.
func (w *Writer) Scopes() ([]Scope, error) {
	entries, err := fs.ReadDir(w.root.FS(), ".")
	if err != nil {
		return nil, err
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
// that are as they should be are not written again. After an error what was there before is there still, or part of it is new.
func (w *Writer) Set(scope Scope, entries []Entry) error {
	folder, err := scope.folder()
	if err != nil {
		return err
	}
	groups := map[group][]writtenEntry{indexGroup: nil}
	last := map[string]Entry{}
	for _, e := range entries {
		last[e.Key] = e
	}
	for _, key := range slices.Sorted(maps.Keys(last)) {
		g, err := groupOf(key)
		if err != nil {
			return err
		}
		e := last[key]
		written := writtenEntry{Key: key, Username: e.Username.Reveal(), Password: e.Password.Reveal()}
		if !e.Expires.IsZero() {
			written.Expires = &e.Expires
		}
		groups[g] = append(groups[g], written)
	}
	if err := w.root.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	known := w.known[scope]
	if known == nil {
		known = map[group][sha256.Size]byte{}
		w.known[scope] = known
	}
	var errs []error
	for g, written := range groups {
		if g != indexGroup {
			errs = append(errs, w.put(folder, g, written, known))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := w.drop(folder, known, func(g group) bool { _, ok := groups[g]; return ok }); err != nil {
		return err
	}
	// The index comes last, so that whoever finds it finds all.
	return w.put(folder, indexGroup, nil, known)
}

// put writes a record where it differs from what this Writer knows to be there.
func (w *Writer) put(folder string, g group, entries []writtenEntry, known map[group][sha256.Size]byte) error {
	raw, err := json.Marshal(entries) //nolint:gosec // of which only the checksum is kept
	if err != nil {
		return errors.New("a record cannot be encoded") // the error might quote it
	}
	sum := sha256.Sum256(raw)
	if was, ok := known[g]; ok && was == sum {
		return nil
	}
	now, err := w.clock()
	if err != nil {
		return err
	}
	file, err := encode(record{Scope: folder, Group: g, Written: now, Entries: entries})
	if err != nil {
		return err
	}
	if err := w.replace(folder, string(g), file); err != nil {
		return err
	}
	known[g] = sum
	return nil
}

// replace puts a file in the place of another, at once.
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
	return w.root.Rename(unfinished, path.Join(folder, name))
}

// drop removes the records that are not to be kept.
func (w *Writer) drop(folder string, known map[group][sha256.Size]byte, keep func(group) bool) error {
	files, err := fs.ReadDir(w.root.FS(), folder)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		if g := group(f.Name()); !keep(g) {
			errs = append(errs, w.root.RemoveAll(path.Join(folder, f.Name())))
			delete(known, g)
		}
	}
	return errors.Join(errs...)
}

// Remove has a scope forgotten.
func (w *Writer) Remove(scope Scope) error {
	folder, err := scope.folder()
	if err != nil {
		return err
	}
	delete(w.known, scope)
	// The index goes first, so that nobody takes what is left for all.
	if err := w.root.Remove(path.Join(folder, string(indexGroup))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return w.root.RemoveAll(folder)
}
