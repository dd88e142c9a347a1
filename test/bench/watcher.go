package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

// patience bounds every wait for what should take seconds.
const patience = 5 * time.Minute

// watcher takes the time of every event of the objects that count, over a connection of its
// own, with the metadata only. It watches objects of all names: the API server buffers no
// more than ten events for those who watch one name.
type watcher struct {
	objects metadata.Getter
	counts  func(*metav1.PartialObjectMetadata) bool
	stop    func()
	ended   chan struct{} // closed when the watch is over

	mu      sync.Mutex
	current *sightings
	// cuts is how often the API server has ended the watch, which it does to clients that
	// are too slow.
	cuts int
}

// sightings are the events of one phase.
type sightings struct {
	watcher *watcher
	kind    watch.EventType
	at      map[string]time.Time // by namespace; zero before
	missing int
	extra   int           // events that nobody has asked for
	done    chan struct{} // closed when none is missing
}

func isPullSecret(secret *metav1.PartialObjectMetadata) bool { return secret.Name == imps.SecretName }

// isLateAndAttached is for a ServiceAccount of the phase accounts that names the Secret.
func isLateAndAttached(account *metav1.PartialObjectMetadata) bool {
	return account.Name == lateAccount && account.Annotations[impsync.AnnotationAttached] != ""
}

func newWatcher(ctx context.Context, objects metadata.Getter, counts func(*metav1.PartialObjectMetadata) bool) (*watcher, error) {
	w := &watcher{objects: objects, counts: counts, ended: make(chan struct{})}
	w.expect("", nil)
	list, err := w.objects.List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list what is watched: %w", err)
	}
	watching, cancel := context.WithCancel(ctx)
	events, err := w.objects.Watch(watching, metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	if err != nil {
		cancel()
		return nil, fmt.Errorf("watch: %w", err)
	}
	w.stop = func() {
		cancel()
		<-w.ended
	}
	go w.follow(watching, events, list.ResourceVersion)
	return w, nil
}

// follow goes on where the last watch has ended: what comes late then counts as late.
func (w *watcher) follow(ctx context.Context, events watch.Interface, version string) {
	defer close(w.ended)
	for {
		for event := range events.ResultChan() {
			now := time.Now()
			object, ok := event.Object.(*metav1.PartialObjectMetadata)
			if !ok {
				break
			}
			version = object.ResourceVersion
			if w.counts(object) {
				w.mu.Lock()
				w.current.see(event.Type, object.Namespace, now)
				w.mu.Unlock()
			}
		}
		events.Stop()
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		w.cuts++
		w.mu.Unlock()
		var err error
		if events, err = w.objects.Watch(ctx, metav1.ListOptions{ResourceVersion: version}); err != nil {
			return // whoever waits hears of it
		}
	}
}

func (s *sightings) see(kind watch.EventType, namespace string, now time.Time) {
	at, expected := s.at[namespace]
	if kind != s.kind || !expected || !at.IsZero() {
		s.extra++
		return
	}
	s.at[namespace] = now
	if s.missing--; s.missing == 0 {
		close(s.done)
	}
}

// expect begins a new phase: one event of this kind in each of the namespaces.
func (w *watcher) expect(kind watch.EventType, namespaces []string) *sightings {
	s := &sightings{watcher: w, kind: kind, at: map[string]time.Time{}, missing: len(namespaces), done: make(chan struct{})}
	for _, namespace := range namespaces {
		s.at[namespace] = time.Time{}
	}
	if s.missing == 0 {
		close(s.done)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.current = s
	return s
}

// wait waits until nothing is missing.
func (s *sightings) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %s", patience))
	defer cancel()
	var err error
	select {
	case <-s.done:
		return nil
	case <-s.watcher.ended:
		err = errors.New("the watch has ended")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	s.watcher.mu.Lock()
	defer s.watcher.mu.Unlock()
	return fmt.Errorf("wait for %d of %d events %s: %w", s.missing, len(s.at), s.kind, err)
}

// since returns the times from what the function says to the events. Only after wait.
func (s *sightings) since(begin func(namespace string) time.Time) []time.Duration {
	times := make([]time.Duration, 0, len(s.at))
	for namespace, at := range s.at {
		times = append(times, at.Sub(begin(namespace)))
	}
	return times
}

// cut is how often the watch was cut so far.
func (w *watcher) cut() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cuts
}

// extras is how many events came that were not expected, up to now.
func (s *sightings) extras() int {
	s.watcher.mu.Lock()
	defer s.watcher.mu.Unlock()
	return s.extra
}
