package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// faults are what goes wrong. What stops the API server or etcd ends before the next step;
// the others go on beside the steps that follow.
func faults() []card {
	return []card{
		{"an agent is killed", 1, endAgent(true)},
		{"an agent is terminated", 1, endAgent(false)},
		{"an agent is suspended", 1, suspendAgent},
		{"the leader is killed", 1, endCoordinators(true, false, true)},
		{"the leader is terminated", 1, endCoordinators(true, false, false)},
		{"the standby is killed", 1, endCoordinators(false, true, true)},
		{"the leader is suspended beyond its Lease", 1, suspendLeader},
		{"both coordinators are killed", 1, endCoordinators(true, true, true)},
		{"both coordinators are terminated", 1, endCoordinators(true, true, false)},

		{"the API server is killed", 1, killComponent((*cluster.Cluster).StopAPIServer, (*cluster.Cluster).StartAPIServer)},
		{"etcd is killed", 1, killComponent((*cluster.Cluster).StopEtcd, (*cluster.Cluster).StartEtcd)},
		{"the API server hangs", 1, suspendComponent(cluster.APIServer)},
		{"etcd hangs", 1, suspendComponent(cluster.Etcd)},

		{"a Node is made anew", 1, remakeNode},
		{"a report is deleted", 1, deleteReport},
		{"a report is garbled", 1, garbleReport},
		{"a rendered Secret is deleted", 1, deleteRendered},
		{"a state Secret is deleted", 1, deleteState},

		{"requests are late", 1, inject(cluster.Fault{Latency: 400 * time.Millisecond})},
		{"requests are reset", 1, inject(cluster.Fault{ResetBefore: true, Match: every(2)})},
		{"answers are reset", 1, inject(cluster.Fault{ResetAfter: true, Match: every(3)})},
		{"requests are too many", 1, inject(cluster.Fault{
			Match: every(2),
			Status: &cluster.Status{
				Code: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"1"}, "Content-Type": {"application/json"}},
				Body: cluster.Failure(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "too many requests").Body,
			},
		})},
		{"watches break", 1, inject(cluster.Fault{TruncateEvents: 3, Match: func(r cluster.Request) bool { return r.Verb == "watch" }})},
		{"connections break", 1, func(_ context.Context, s *soak) (string, error) {
			s.proxy.BreakAll()
			return "all at once", nil
		}},
	}
}

// about returns a time around one.
func (s *soak) about(d time.Duration) time.Duration {
	return d/2 + time.Duration(s.random.Int64N(int64(d)))
}

// steps is how many steps a fault lasts, at least.
func (s *soak) steps() int { return 3 + s.random.IntN(10) }

func endAgent(crash bool) func(context.Context, *soak) (string, error) {
	return func(_ context.Context, s *soak) (string, error) {
		node := pick(s, slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == longLived }))
		if !s.free(node) {
			return "", nil
		}
		return node, s.restart(node, crash, s.steps(), s.about(2*time.Second), s.fleet.agent(node))
	}
}

func suspendAgent(_ context.Context, s *soak) (string, error) {
	node := pick(s, nodes)
	if !s.free(node) {
		return "", nil
	}
	return node, s.suspend(s.fleet.agent(node), node, s.steps(), s.about(6*time.Second))
}

// coordinators is the slot of all faults of coordinators.
const coordinators = "coordinators"

func endCoordinators(leader, standby, crash bool) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		if !s.free(coordinators) {
			return "", nil
		}
		var members []*member
		leads, waits := s.fleet.leader(ctx)
		if leader {
			members = append(members, leads)
		}
		if standby {
			members = append(members, waits)
		}
		var who []string
		for _, m := range members {
			who = append(who, m.name)
		}
		return strings.Join(who, ", "), s.restart(coordinators, crash, s.steps(), s.about(3*time.Second), members...)
	}
}

func suspendLeader(ctx context.Context, s *soak) (string, error) {
	if !s.free(coordinators) {
		return "", nil
	}
	leads, _ := s.fleet.leader(ctx)
	return leads.name, s.suspend(leads, coordinators, 20, 20*time.Second) // longer than the other waits for the Lease
}

// killComponent kills a part of the control plane and starts it again. Now and then an agent
// is killed and started meanwhile.
func killComponent(stop func(*cluster.Cluster) error, start func(*cluster.Cluster, context.Context) error) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		d, node := s.about(2*time.Second), ""
		if s.random.IntN(2) == 0 && s.free("node-a") {
			node = "node-a"
		}
		s.crashed = true
		if err := stop(s.control); err != nil {
			return "", err
		}
		if node != "" {
			m := s.fleet.agent(node)
			if err := m.end(true); err != nil {
				return "", err
			}
			if err := m.run(ctx); err != nil {
				return "", err
			}
		}
		if err := pause(ctx, d); err != nil {
			return "", err
		}
		return fmt.Sprintf("for %s %s", d, node), start(s.control, ctx)
	}
}

func suspendComponent(component cluster.Component) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		d := s.about(4 * time.Second)
		if err := s.control.Signal(component, syscall.SIGSTOP); err != nil {
			return "", err
		}
		err := pause(ctx, d)
		if signalErr := s.control.Signal(component, syscall.SIGCONT); signalErr != nil {
			err = signalErr
		}
		return "for " + d.String(), err
	}
}

// remakeNode deletes the object of a Node and makes it again later.
func remakeNode(ctx context.Context, s *soak) (string, error) {
	node := pick(s, nodes)
	if !s.free("object of " + node) {
		return "", nil
	}
	s.gone[node] = true
	if s.garbled[node] {
		s.forgetDemand(node)
	}
	s.later("make "+node, "object of "+node, s.steps(), 0, func(ctx context.Context) error {
		delete(s.gone, node)
		return until(ctx, "make "+node, func(ctx context.Context) error { return s.control.Node(ctx, node) })
	})
	return node, until(ctx, "delete "+node, func(ctx context.Context) error {
		return ignore(s.core.CoreV1().Nodes().Delete(ctx, node, metav1.DeleteOptions{}), apierrors.IsNotFound)
	})
}

func deleteReport(ctx context.Context, s *soak) (string, error) {
	node := pick(s, nodes)
	s.forgetDemand(node) // nobody knows of it until the agent writes again
	return node, until(ctx, "delete the report of "+node, func(ctx context.Context) error {
		err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).Delete(ctx, impsync.ReportName(node), metav1.DeleteOptions{})
		return ignore(err, apierrors.IsNotFound)
	})
}

func garbleReport(ctx context.Context, s *soak) (string, error) {
	node := pick(s, nodes)
	s.garbled[node] = true
	if s.gone[node] {
		s.forgetDemand(node)
	}
	return node, until(ctx, "garble the report of "+node, func(ctx context.Context) error {
		_, err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).Patch(ctx, impsync.ReportName(node), types.MergePatchType,
			[]byte(`{"data":{"report":"garbage"}}`), metav1.PatchOptions{})
		return ignore(err, apierrors.IsNotFound)
	})
}

func deleteRendered(ctx context.Context, s *soak) (string, error) {
	r := s.resources[pick(s, names(s.resources, func(r *resource) bool { return !r.spec.empty() }))]
	if r == nil {
		return "", nil
	}
	if r.stateLost {
		return r.name + ", not without its state Secret", nil // then nobody would know the credentials any more
	}
	r.renderedLost = true
	return r.name, until(ctx, "delete the rendered Secret of "+r.name, func(ctx context.Context) error {
		err := s.core.CoreV1().Secrets(imps.RenderedNamespace).Delete(ctx, impsync.RenderedName(r.uid), metav1.DeleteOptions{})
		return ignore(err, apierrors.IsNotFound)
	})
}

func deleteState(ctx context.Context, s *soak) (string, error) {
	r := s.resources[pick(s, names(s.resources, func(r *resource) bool { return !r.spec.empty() }))]
	if r == nil {
		return "", nil
	}
	if r.renderedLost {
		return r.name + ", not without its rendered Secret", nil
	}
	r.stateLost = true
	return r.name, until(ctx, "delete the state Secret of "+r.name, func(ctx context.Context) error {
		err := s.core.CoreV1().Secrets(imps.SystemNamespace).Delete(ctx, impsync.StateName(r.uid), metav1.DeleteOptions{})
		return ignore(err, apierrors.IsNotFound)
	})
}

// inject does something to the requests of the processes behind the proxy for a while.
func inject(fault cluster.Fault) func(context.Context, *soak) (string, error) {
	return func(_ context.Context, s *soak) (string, error) {
		if !s.free("proxy") {
			return "", nil
		}
		d := s.about(5 * time.Second)
		injection := s.proxy.Inject(fault)
		s.later("the proxy", "proxy", s.steps(), d, func(context.Context) error {
			injection.Remove()
			return nil
		})
		return "for " + d.String(), nil
	}
}

// every matches each n-th request.
func every(n uint64) func(cluster.Request) bool {
	var count atomic.Uint64
	return func(cluster.Request) bool { return count.Add(1)%n == 0 }
}

// helpCollector starts the controller manager anew where its garbage collector does not get
// over orphaning what belonged to a resource. That is no fault of imps: where a watch of
// it broke, and a Secret was deleted and made anew meanwhile, it takes the two for one, and
// goes on trying to change the one that is gone.
func (s *soak) helpCollector(ctx context.Context, resource metav1.Object) error {
	going := resource.GetDeletionTimestamp()
	if going == nil || !slices.Contains(resource.GetFinalizers(), metav1.FinalizerOrphanDependents) ||
		time.Since(going.Time) < collectorPatience || time.Since(s.collectorHelped) < collectorPatience {
		return nil
	}
	s.collectorHelped = time.Now()
	s.collectorHelps++
	s.note("help", "start the controller manager anew, for "+resource.GetName())
	return s.control.RestartControllerManager(ctx)
}
