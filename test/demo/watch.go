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
	w := &watcher{stop: events.Stop}
	go w.follow(events)
	return w, nil
}

func (w *watcher) follow(events watch.Interface) {
	for event := range events.ResultChan() {
		now := time.Now()
		w.mu.Lock()
		if secret, ok := event.Object.(*corev1.Secret); ok {
			w.seen = append(w.seen, sighting{now, event.Type, secret})
		} else {
			w.err = fmt.Errorf("the watch says %s: %v", event.Type, event.Object)
		}
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = errors.Join(w.err, errors.New("the watch has ended"))
}

// in returns what was seen in a namespace.
func (w *watcher) in(namespace string) sightings {
	return slices.DeleteFunc(w.all(), func(s sighting) bool { return s.secret.Namespace != namespace })
}

func (w *watcher) all() sightings {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen)
}

// await returns the first sighting in a namespace that matches, also one before the call.
func (w *watcher) await(ctx context.Context, namespace, what string, match func(sighting) bool) (found sighting, err error) {
	err = eventually(ctx, "the Secret of "+namespace+" is "+what, func(context.Context) error {
		seen := w.in(namespace)
		i := slices.IndexFunc(seen, match)
		if i < 0 {
			w.mu.Lock()
			defer w.mu.Unlock()
			return errors.Join(errors.New(seen.String()), w.err)
		}
		found = seen[i]
		return nil
	})
	return found, err
}

type sightings []sighting

// String tells the kinds only: what a Secret holds is not for people.
func (all sightings) String() string {
	if len(all) == 0 {
		return "nothing at the watcher"
	}
	kinds := make([]string, 0, len(all))
	for _, s := range all {
		kinds = append(kinds, string(s.kind))
	}
	return strings.Join(kinds, ", ") + " at the watcher"
}

func created(s sighting) bool { return s.kind == watch.Added }
func deleted(s sighting) bool { return s.kind == watch.Deleted }
