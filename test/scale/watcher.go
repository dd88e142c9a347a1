package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// watcher sees what becomes of the target Secrets, as anybody who is not imps would.
type watcher struct {
	stop func()

	mu   sync.Mutex
	seen changes
	err  error
}

// change is an event of a target Secret.
type change struct {
	at   time.Time
	kind watch.EventType
	// secret is its namespace and name.
	secret string
}

type changes []change

func newWatcher(ctx context.Context, client metadata.Interface) (*watcher, error) {
	secrets := client.Resource(impsync.SecretResource)
	list, err := secrets.List(ctx, metav1.ListOptions{LabelSelector: impsync.LabelOwnerUID})
	if err != nil {
		return nil, fmt.Errorf("list target Secrets: %w", err)
	}
	// It goes on where the API server ends a watch, as it does to a client that it finds slow.
	events, err := watchtools.NewRetryWatcherWithContext(context.WithoutCancel(ctx), list.ResourceVersion,
		&cache.ListWatch{WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.LabelSelector = impsync.LabelOwnerUID
			return secrets.Watch(ctx, options)
		}})
	if err != nil {
		return nil, fmt.Errorf("watch target Secrets: %w", err)
	}
	done := make(chan struct{})
	w := &watcher{stop: func() {
		events.Stop()
		<-done
	}}
	go func() {
		defer close(done)
		w.follow(events)
	}()
	return w, nil
}

func (w *watcher) follow(events watch.Interface) {
	for event := range events.ResultChan() {
		now := time.Now()
		w.mu.Lock()
		if m, ok := event.Object.(*metav1.PartialObjectMetadata); ok {
			w.seen = append(w.seen, change{now, event.Type, m.Namespace + "/" + m.Name})
		} else {
			w.err = fmt.Errorf("the watch of the target Secrets says %s", event.Type)
		}
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = errors.Join(w.err, errors.New("the watch of the target Secrets has ended"))
}

// len is how much was seen so far; since returns what was seen from there on.
func (w *watcher) len() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.seen)
}

func (w *watcher) since(from int) changes {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen[from:])
}

// times are when something was seen of each Secret.
type times map[string]time.Time

// last notes how long it took until the last of them, if there was any.
func (p *phase) last(seen times, begin time.Time) {
	last := begin
	for _, at := range seen {
		if at.After(last) {
			last = at
		}
	}
	if len(seen) > 0 {
		p.figure("last Secret after", last.Sub(begin).Seconds(), "s")
	}
}

// awaitChanges waits for events of a kind about n Secrets, and returns the first about each.
func (s *simulation) awaitChanges(ctx context.Context, from int, kind watch.EventType, n int) (times, error) {
	first := times{}
	err := s.await(ctx, fmt.Sprintf("%d Secrets are %s", n, kind), 20*time.Millisecond, func() (bool, error) {
		clear(first)
		for _, c := range s.watcher.since(from) {
			if _, ok := first[c.secret]; c.kind == kind && !ok {
				first[c.secret] = c.at
			}
		}
		s.watcher.mu.Lock()
		defer s.watcher.mu.Unlock()
		return len(first) >= n, s.watcher.err
	})
	if err != nil {
		return nil, fmt.Errorf("%w; seen: %d", err, len(first))
	}
	return first, nil
}

// kinds counts events by their kind.
func (all changes) kinds() map[watch.EventType]int {
	kinds := map[watch.EventType]int{}
	for _, c := range all {
		kinds[c.kind]++
	}
	return kinds
}
