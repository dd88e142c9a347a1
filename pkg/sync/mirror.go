package sync

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	"github.com/go-logr/logr"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// MirrorConfig says what a Mirror keeps.
type MirrorConfig[T any] struct {
	// Name of what is watched, for logs.
	Name string
	// ListWatch is one list-watch, and Example an object of the type that it returns.
	ListWatch cache.ListerWatcher
	Example   runtime.Object
	// Convert returns the part of an object that is kept. It must not keep the object.
	Convert func(runtime.Object) T
	// OnChange is told of every event, in order, from one goroutine, after the Mirror has
	// changed: old is nil for a new object, current is nil for one that is gone. Optional.
	OnChange func(key types.NamespacedName, old, current *T)
	// OnError is told when the watch fails, and with nil when it works again. Optional.
	OnError func(error)
	// Version returns the resourceVersion of what is kept. With it, Put can record the
	// answer to a write before the watch brings it. Optional.
	Version func(T) string
	Log     *slog.Logger
}

// Mirror keeps the part T of every object that one list-watch returns: client-go's
// Reflector, with nothing kept but what is needed. It streams its first list where the
// server can (watch-list), and falls back where not.
type Mirror[T any] struct {
	config MirrorConfig[T]
	synced chan struct{}

	mu    sync.RWMutex
	items map[types.NamespacedName]T
	// told is the resourceVersion up to which the watch has told of every end: that of the
	// last list, or of the last deletion.
	told  string
	ready bool
	err   error
}

// NewMirror returns a Mirror that starts with Run.
func NewMirror[T any](config MirrorConfig[T]) *Mirror[T] {
	return &Mirror[T]{config: config, synced: make(chan struct{}), items: make(map[types.NamespacedName]T)}
}

// Run keeps the mirror up to date until ctx ends.
func (m *Mirror[T]) Run(ctx context.Context) {
	// A reflector logs every failed attempt; here it is one line when the state changes,
	// and no line can hold an object.
	silent := logr.Discard()
	reflector := cache.NewReflectorWithOptions(observedListWatch[T]{m}, m.config.Example, mirrorStore[T]{m},
		cache.ReflectorOptions{Name: m.config.Name, Logger: &silent})
	reflector.RunWithContext(klog.NewContext(ctx, silent))
}

// Newer reports whether the resourceVersion a is later than b; false where it cannot be told.
func Newer(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order > 0
}

// newer reports whether a is a later state than b.
func (m *Mirror[T]) newer(a, b T) bool {
	return m.config.Version != nil && Newer(m.config.Version(a), m.config.Version(b))
}

// Synced is closed once the first list is in.
func (m *Mirror[T]) Synced() <-chan struct{} { return m.synced }

// Get returns what is kept of the object.
func (m *Mirror[T]) Get(key types.NamespacedName) (T, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	item, ok := m.items[key]
	return item, ok
}

// Len returns the number of objects.
func (m *Mirror[T]) Len() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.items)
}

// Range calls f for every object, in no order, until f returns false. f must not write to
// the Mirror.
func (m *Mirror[T]) Range(f func(types.NamespacedName, T) bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for key, item := range m.items {
		if !f(key, item) {
			return
		}
	}
}

// Err returns why the watch does not work at present, if it does not.
func (m *Mirror[T]) Err() error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.err
}

// Put records the state of an object that a write returned, unless the watch has already
// brought a newer one. OnChange is not called.
func (m *Mirror[T]) Put(key types.NamespacedName, item T) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Events come in their order: what is older than the last list, or than the last end that
	// was told, has been told of as well. If it is not there, it has come and gone.
	if _, ok := m.items[key]; !ok && m.config.Version != nil && Newer(m.told, m.config.Version(item)) {
		return
	}
	m.put(key, item)
}

// Drop forgets an object that was deleted, if it is still in this state.
func (m *Mirror[T]) Drop(key types.NamespacedName, same func(T) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if item, ok := m.items[key]; ok && same(item) {
		delete(m.items, key)
	}
}

func (m *Mirror[T]) put(key types.NamespacedName, item T) (old *T, changed bool) {
	if was, ok := m.items[key]; ok {
		if m.newer(was, item) {
			return nil, false
		}
		old = &was
	}
	m.items[key] = item
	return old, true
}

func (m *Mirror[T]) upsert(object any) error {
	key, item, err := m.convert(object)
	if err != nil {
		return err
	}
	m.mu.Lock()
	old, changed := m.put(key, item)
	m.mu.Unlock()
	if changed {
		m.notify(key, old, &item)
	}
	return nil
}

func (m *Mirror[T]) remove(object any) error {
	key, item, err := m.convert(object)
	if err != nil {
		return err
	}
	m.mu.Lock()
	if m.config.Version != nil {
		m.told = m.config.Version(item)
	}
	old, ok := m.items[key]
	if ok = ok && !m.newer(old, item); ok {
		delete(m.items, key)
	}
	m.mu.Unlock()
	if ok {
		m.notify(key, &old, nil)
	}
	return nil
}

func (m *Mirror[T]) replace(objects []any, version string) error {
	items := make(map[types.NamespacedName]T, len(objects))
	for _, object := range objects {
		key, item, err := m.convert(object)
		if err != nil {
			return err
		}
		items[key] = item
	}
	m.mu.Lock()
	was := m.items
	m.items = maps.Clone(items) // what is told below is walked without the lock
	m.told = version
	first := !m.ready
	m.ready = true
	m.mu.Unlock()

	for key, item := range items {
		if old, ok := was[key]; ok {
			m.notify(key, &old, &item)
		} else {
			m.notify(key, nil, &item)
		}
	}
	for key, old := range was {
		if _, ok := items[key]; !ok {
			m.notify(key, &old, nil)
		}
	}
	if first {
		close(m.synced)
	}
	return nil
}

func (m *Mirror[T]) notify(key types.NamespacedName, old, current *T) {
	if m.config.OnChange != nil {
		m.config.OnChange(key, old, current)
	}
}

func (m *Mirror[T]) convert(object any) (key types.NamespacedName, item T, err error) {
	o, ok := object.(runtime.Object)
	if !ok {
		return key, item, fmt.Errorf("mirror %s: %T is no object", m.config.Name, object)
	}
	meta, ok := object.(metav1.Object)
	if !ok {
		return key, item, fmt.Errorf("mirror %s: %T has no metadata", m.config.Name, object)
	}
	return types.NamespacedName{Namespace: meta.GetNamespace(), Name: meta.GetName()}, m.config.Convert(o), nil
}

// observe notes the result of a list or watch call.
func (m *Mirror[T]) observe(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	was := m.err
	m.err = err
	m.mu.Unlock()
	switch {
	case err != nil && was == nil:
		m.config.Log.Warn("watch failed, trying again until it works", "watch", m.config.Name, "error", Explain(err))
	case err == nil && was != nil:
		m.config.Log.Info("watch works again", "watch", m.config.Name)
	default:
		return
	}
	if m.config.OnError != nil {
		m.config.OnError(err)
	}
}

// mirrorStore is what the Reflector writes into.
type mirrorStore[T any] struct{ m *Mirror[T] }

func (s mirrorStore[T]) Add(object any) error    { return s.m.upsert(object) }
func (s mirrorStore[T]) Update(object any) error { return s.m.upsert(object) }
func (s mirrorStore[T]) Delete(object any) error { return s.m.remove(object) }
func (s mirrorStore[T]) Replace(objects []any, version string) error {
	return s.m.replace(objects, version)
}
func (mirrorStore[T]) Resync() error { return nil }

// observedListWatch tells the Mirror of the result of every call.
type observedListWatch[T any] struct{ m *Mirror[T] }

func (o observedListWatch[T]) ListWithContext(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	list, err := cache.ToListerWithContext(o.m.config.ListWatch).ListWithContext(ctx, options)
	if err != nil { // that it works again, the watch that follows says
		o.m.observe(ctx, err)
	}
	return list, err
}

func (o observedListWatch[T]) WatchWithContext(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	w, err := cache.ToWatcherWithContext(o.m.config.ListWatch).WatchWithContext(ctx, options)
	if err != nil && options.SendInitialEvents != nil {
		// A server without watch-list refuses the first watch, and the list comes next. So
		// it shall after every error: for some of them the Reflector would rather wait and
		// try again, where it neither returns nor heeds the end of ctx.
		return nil, fmt.Errorf("watch-list: %s", Explain(err))
	}
	o.m.observe(ctx, err)
	return w, err
}

func (o observedListWatch[T]) List(options metav1.ListOptions) (runtime.Object, error) {
	return o.ListWithContext(context.Background(), options)
}

func (o observedListWatch[T]) Watch(options metav1.ListOptions) (watch.Interface, error) {
	return o.WatchWithContext(context.Background(), options)
}
