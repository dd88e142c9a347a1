package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// watcher sees every Secret with the name of the pull Secret, as anybody who is not imps would.
type watcher struct {
	stop func()

	mu   sync.Mutex
	seen []sighting
	err  error
	news chan struct{} // closed with the next sighting
}

// sighting is an event of the watch.
type sighting struct {
	at     time.Time
	kind   watch.EventType
	secret *corev1.Secret
}

func newWatcher(ctx context.Context, client kubernetes.Interface) (*watcher, error) {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, secretName).String()}
	list, err := client.CoreV1().Secrets("").List(ctx, options)
	if err != nil {
		return nil, fmt.Errorf("list pull Secrets: %w", err)
	}
	options.ResourceVersion = list.ResourceVersion
	events, err := client.CoreV1().Secrets("").Watch(context.WithoutCancel(ctx), options)
	if err != nil {
		return nil, fmt.Errorf("watch pull Secrets: %w", err)
	}
	w := &watcher{stop: events.Stop, news: make(chan struct{})}
	go w.follow(events)
	return w, nil
}

func (w *watcher) follow(events watch.Interface) {
	for event := range events.ResultChan() {
		now := time.Now()
		if secret, ok := event.Object.(*corev1.Secret); ok {
			w.note(sighting{now, event.Type, secret}, nil)
		} else {
			w.note(sighting{}, fmt.Errorf("the watch of the pull Secrets says: %v", event.Object))
		}
	}
	w.note(sighting{}, errors.New("the watch of the pull Secrets has ended"))
}

func (w *watcher) note(s sighting, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.err = err
	} else {
		w.seen = append(w.seen, s)
	}
	close(w.news)
	w.news = make(chan struct{})
}

// await returns the first sighting in a namespace that matches, also one before the call.
func (w *watcher) await(ctx context.Context, namespace, what string, match func(sighting) bool) (sighting, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not within %s", within))
	defer cancel()
	for {
		// First this, so that nothing is missed that comes after the look.
		w.mu.Lock()
		news, err := w.news, w.err
		w.mu.Unlock()
		seen := w.in(namespace)
		if i := slices.IndexFunc(seen, match); i >= 0 {
			return seen[i], nil
		}
		if err != nil {
			return sighting{}, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return sighting{}, fmt.Errorf("wait for the Secret in namespace %s that %s: %w; the watcher has seen there: %s",
				namespace, what, context.Cause(ctx), describe(w.in(namespace)))
		}
	}
}

// in returns all sightings in a namespace.
func (w *watcher) in(namespace string) []sighting {
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []sighting
	for _, s := range w.seen {
		if s.secret.Namespace == namespace {
			found = append(found, s)
		}
	}
	return found
}

func describe(seen []sighting) string {
	if len(seen) == 0 {
		return "nothing"
	}
	kinds := make([]string, 0, len(seen))
	for _, s := range seen {
		kinds = append(kinds, string(s.kind))
	}
	return strings.Join(kinds, ", ")
}

// all returns all sightings.
func (w *watcher) all() []sighting {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen)
}
