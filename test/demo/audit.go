package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// actors are the users that write pull Secrets, and what the audience calls them.
var actors = []struct{ name, user string }{
	{"agent", "system:serviceaccount:" + systemNamespace + ":" + imps.AgentAccount},
	{"coordinator", "system:serviceaccount:" + systemNamespace + ":" + imps.CoordinatorAccount},
	{"garbage collector", "system:serviceaccount:kube-system:generic-garbage-collector"},
}

func actorOf(e cluster.Event) string {
	for _, actor := range actors {
		if actor.user == e.User {
			return actor.name
		}
	}
	return e.User
}

// writes returns the requests for pull Secrets that are no reading, of everyone but the demo itself.
func (d *demo) writes() ([]cluster.Event, error) {
	events, err := d.control.Audit().Since(d.mark)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(events, func(e cluster.Event) bool {
		return e.Group != "" || e.Resource != "secrets" || e.Name != secretName ||
			e.User == "admin" || slices.Contains([]string{"get", "list", "watch"}, e.Verb)
	}), nil
}

// creator returns who created the Secret of a namespace.
func (d *demo) creator(ctx context.Context, namespace string) (by string, err error) {
	err = eventually(ctx, "the audit log has the creation in "+namespace, func(context.Context) error {
		events, err := d.writes()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(events, func(e cluster.Event) bool { return e.Namespace == namespace && e.Code == http.StatusCreated })
		if i < 0 {
			return fmt.Errorf("%d writes, but not this", len(events))
		}
		by = actorOf(events[i])
		return nil
	})
	return by, err
}

// account compares what has become of the pull Secrets with the requests to write them.
func (d *demo) account(context.Context) error {
	seen := map[watch.EventType]int{}
	for _, s := range d.watcher.all() {
		if s.secret.Namespace != occupied {
			seen[s.kind]++
		}
	}
	events, err := d.writes()
	if err != nil {
		return err
	}
	requests, extra, foreign := map[string]int{}, 0, 0
	for _, e := range events {
		requests[string(kindOf(e))+actorOf(e)]++
		if kindOf(e) != refused {
			extra++
		}
		if e.Namespace == occupied {
			foreign++
		}
	}
	d.note("Events at the watcher, and requests to write in the API server's audit log:")
	d.say("")
	widths := []int{9, -12, -9, -14, -20}
	d.row(widths, "", "events", "by agents", "by coordinator", "by garbage collector")
	for _, kind := range []watch.EventType{watch.Added, watch.Modified, watch.Deleted, refused} {
		cells := []any{kind, seen[kind]}
		for _, actor := range actors {
			cells = append(cells, requests[string(kind)+actor.name])
		}
		d.row(widths, cells...)
		extra -= seen[kind]
	}
	all := len(d.subjects())
	d.check("every Secret was created once, changed once by the rotation, and deleted once where it had to be",
		map[watch.EventType]int{watch.Added: all, watch.Modified: all, watch.Deleted: all - len(d.served)}, seen)
	d.check(fmt.Sprintf("one write for each change, and %d that found it done (at most one for each Pod)", extra), true, extra >= 0 && extra <= 2)
	d.check("nobody tried to write the foreign Secret", 0, foreign)
	return nil
}

// refused is the kind of a request that changed nothing.
const refused watch.EventType = "REFUSED"

// kindOf returns the event that a request gives rise to.
func kindOf(e cluster.Event) watch.EventType {
	switch {
	case e.Code == http.StatusCreated:
		return watch.Added
	case e.Code == http.StatusOK && e.Verb == "delete":
		return watch.Deleted
	case e.Code == http.StatusOK:
		return watch.Modified
	default:
		return refused
	}
}
