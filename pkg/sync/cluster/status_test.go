package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// maxMessage is the limit of a condition's message in the CRD.
const maxMessage = 32768

func TestSummarize(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		outcomes map[string]outcome
		want     summary
	}{
		"nothing": {nil, summary{}},
		"delivered": {
			map[string]outcome{"b": {kind: delivered, counter: 7}, "a": {kind: delivered, counter: 7}},
			summary{counts: v1alpha1.NamespaceCounts{Selected: 2, Delivered: 2}, managed: []string{"a", "b"}},
		},
		"delivered before, and not yet now": {
			map[string]outcome{"a": {kind: delivered, counter: 6}, "b": {kind: pending, counter: 6}},
			summary{counts: v1alpha1.NamespaceCounts{Selected: 2}, managed: []string{"a", "b"}, pending: 2},
		},
		"not delivered yet": {
			map[string]outcome{"a": {kind: pending}},
			summary{counts: v1alpha1.NamespaceCounts{Selected: 1}, pending: 1},
		},
		"excluded ones are not selected": {
			map[string]outcome{"a": {kind: excluded}, "b": {kind: delivered, counter: 7}},
			summary{counts: v1alpha1.NamespaceCounts{Selected: 1, Delivered: 1, Excluded: 1}, managed: []string{"b"}},
		},
		"all that fails is selected, and has the Secret where it had it before": {
			map[string]outcome{
				"d": {kind: failed, counter: 6, message: "no"}, "c": {kind: foreign, message: "a user's"},
				"b": {kind: conflicted, message: "an older one"}, "a": {kind: failed, message: "quota"},
			},
			summary{counts: v1alpha1.NamespaceCounts{Selected: 4}, managed: []string{"d"}, failed: []string{"a: quota", "b: an older one", "c: a user's", "d: no"}},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byName), 7)
				c.outcomes = test.outcomes
				require.Equal(t, test.want, s.summarize(c))
			})
		})
	}
}

func TestWhatCouldNotBeDeletedCountsForItsOwner(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		for _, namespace := range []string{"b", "a"} {
			s.undeletable[targetKey{namespace, "pull"}] = undeletable{owner: "uid-a", message: "no"}
			s.undeletable[targetKey{namespace, "other"}] = undeletable{owner: "uid-b", message: "no"}
		}
		require.Equal(t, summary{undeletable: []string{"a/pull: no", "b/pull: no"}}, s.summarize(c), "it is not selected")
	})
}

func TestReady(t *testing.T) {
	t.Parallel()
	condition := func(status metav1.ConditionStatus, message string) metav1.Condition {
		return metav1.Condition{Status: status, Reason: "R" + message, Message: message}
	}
	yes, unknown := condition(metav1.ConditionTrue, "y"), condition(metav1.ConditionUnknown, "u")
	first, second := condition(metav1.ConditionFalse, "1"), condition(metav1.ConditionFalse, "2")
	for name, test := range map[string]struct {
		conditions []metav1.Condition
		status     metav1.ConditionStatus
		message    string
	}{
		"all are true":                 {[]metav1.Condition{yes, yes}, metav1.ConditionTrue, "everything that was asked for is done"},
		"one is unknown":               {[]metav1.Condition{yes, unknown, yes}, metav1.ConditionUnknown, "u"},
		"one is false":                 {[]metav1.Condition{yes, first}, metav1.ConditionFalse, "1"},
		"false counts before unknown":  {[]metav1.Condition{unknown, first}, metav1.ConditionFalse, "1"},
		"false counts after unknown":   {[]metav1.Condition{first, unknown}, metav1.ConditionFalse, "1"},
		"the first that is false says": {[]metav1.Condition{yes, first, second}, metav1.ConditionFalse, "1"},
		"the first unknown says": {
			[]metav1.Condition{unknown, condition(metav1.ConditionUnknown, "v")}, metav1.ConditionUnknown, "u",
		},
	} {
		got := ready(test.conditions)
		require.Equal(t, v1alpha1.ConditionReady, got.Type, name)
		require.Equal(t, test.status, got.Status, name)
		require.Equal(t, test.message, got.Message, name)
		require.NotEmpty(t, got.Reason, name)
	}
}

func TestListed(t *testing.T) {
	t.Parallel()
	require.Empty(t, listed(nil))
	require.Equal(t, "a; b; c", listed([]string{"a", "b", "c"}))
	require.Equal(t, "a; b; c; and 2 more", listed([]string{"a", "b", "c", "d", "e"}))
}

func TestStatusOf(t *testing.T) {
	t.Parallel()
	ok := map[string]string{"ns.a": "Ok"}
	secrets := corev1.Resource("secrets")
	tests := map[string]struct {
		target string
		edit   func(t *testing.T, s *situation, c *claim)
		status string
		// conditions are "<type>=<status> <reason>".
		conditions []string
		// says is in the message of SecretsReady, reason in the status; kubelet is the message of KubeletReady.
		says, reason, kubelet string
	}{
		"all is done": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}}
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "1 of 1 selected namespaces have the Secret",
		},
		"nothing is selected": {
			target: byNone, status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "0 of 0 selected namespaces have the Secret",
		},
		"no spec: it asks for nothing, and has it (K1)": {
			target: `{}`, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.rendered, c.sources = impsync.Rendered{}, nil
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
		},
		"it asks for nothing any more": {
			target: `{}`, edit: func(t *testing.T, s *situation, c *claim) {
				t.Helper()
				require.NoError(t, s.withdraw(t.Context(), c, 0))
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "0 of 0 selected namespaces have the Secret",
		},
		"in progress: neither Ready nor Failed": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}, "m": {kind: pending}}
			},
			status: "", conditions: []string{"Ready=Unknown Progressing", "SourcesReady=True Ready", "SecretsReady=Unknown Progressing"},
			says: "1 of 2 selected namespaces have the Secret",
		},
		"a user's Secret is in the way": {
			target: byName, edit: func(_ *testing.T, s *situation, c *claim) {
				m := applied(s.t, "n", c.rendered.Target)
				users(m)
				s.mirrorOf(s.t, "pull", m)
				s.decides()
			},
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=False DeliveryFailed"},
			says:   "0 of 1 selected namespaces have the Secret; not n: a Secret of that name is there that is not imps's, and is left alone",
			reason: "is not imps's",
		},
		"many namespaces fail: the first are told": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.outcomes = map[string]outcome{"ok": {kind: delivered, counter: 7}}
				for i := range 100 {
					c.outcomes[fmt.Sprintf("n%03d", i)] = outcome{kind: failed, message: "no"}
				}
			},
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=False DeliveryFailed"},
			says: "1 of 101 selected namespaces have the Secret; not n000: no; n001: no; n002: no; and 97 more",
		},
		"a source fails, and the rest is done": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.sources = map[string]string{"ns.a": "Ok", "ns.b": "not found"}
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}}
			},
			status: "Failed", conditions: []string{"Ready=False SourceFailed", "SourcesReady=False SourceFailed", "SecretsReady=True Ready"},
			says: "1 of 1 selected namespaces have the Secret", reason: "1 of 2 sources cannot be used: ns.b: not found",
		},
		"no source has given anything yet": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.sources, c.rendered = map[string]string{"ns.a": "not found"}, impsync.Rendered{}
			},
			status: "Failed", conditions: []string{"Ready=False SourceFailed", "SourcesReady=False SourceFailed", "SecretsReady=False NothingToDeliver"},
			says: "no source has given credentials yet",
		},
		"the spec is wrong": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.problem = errors.New("spec.target.secret.name is empty")
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}}
			},
			status: "Failed", conditions: []string{"Ready=False InvalidSpec", "SourcesReady=True Ready", "SecretsReady=False InvalidSpec"},
			says: "spec.target.secret.name is empty; what was delivered before stays as it is",
		},
		"a Pod selector was skipped": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.skipped = []error{errors.New("spec.target.namespacesWithPods.labels[0]: bad")}
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}}
			},
			status: "Failed", conditions: []string{"Ready=False InvalidSpec", "SourcesReady=True Ready", "SecretsReady=False InvalidSpec"},
			says: "spec.target.namespacesWithPods.labels[0]: bad; this selector is left out, the others are served",
		},
		"the credentials could not be written": {
			target: byName, edit: func(_ *testing.T, _ *situation, c *claim) {
				c.failure = fmt.Errorf("write Secret x: %w", apierrors.NewForbidden(secrets, "x", errors.New("no")))
			},
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=False DeliveryFailed"},
			says: `this will be tried again: secrets "x" is forbidden: no`,
		},
		"a Secret could not be deleted": {
			target: byName, edit: func(_ *testing.T, s *situation, c *claim) {
				c.outcomes = map[string]outcome{"n": {kind: delivered, counter: 7}}
				s.undeletable[targetKey{"m", "pull"}] = undeletable{owner: "uid-a", message: "forbidden"}
			},
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=False DeliveryFailed"},
			says: "Secrets that are no longer wanted could not be deleted: m/pull: forbidden",
		},
		"rescue is not allowed": {
			target: `{secret: {name: pull}, rescue: true}`,
			status: "Failed", conditions: []string{"Ready=False NotAllowed", "SourcesReady=True Ready", "SecretsReady=True Ready", "ServiceAccountsReady=False NotAllowed"},
			says: "0 of 0", reason: "spec.target.rescue is set, and --allow-rescue is not, so that no Pod is evicted: the chart's value allowRescue sets it",
		},
		"rescue is allowed": {
			target: `{secret: {name: pull}, rescue: true}`, edit: func(_ *testing.T, s *situation, _ *claim) { s.config.AllowRescue = true },
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "0 of 0",
		},
		"every node serves its kubelet": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) {
				s.kubelet("n1", "")
				s.kubelet("n2", "")
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=True Ready"},
			kubelet: "2 of 2 nodes have said that their node cache is up to date",
		},
		"nodes without an agent are no failure for kubelets": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) {
				s.kubelet("n1", "")
				s.node("n2", false)
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=True Ready"},
			kubelet: "1 of 2 nodes have said that their node cache is up to date; 1 have no agent",
		},
		"unless no node has one": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) { s.node("n2", false) },
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=False DeliveryFailed"},
			kubelet: "0 of 1 nodes have said that their node cache is up to date; 1 have no agent",
		},
		"nodes cannot write their cache": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) {
				s.kubelet("n2", "no space left on device")
				s.kubelet("n1", "another agent writes it")
				s.kubelet("n3", "")
			},
			status: "Failed", conditions: []string{"Ready=False DeliveryFailed", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=False DeliveryFailed"},
			kubelet: "1 of 3 nodes have said that their node cache is up to date; not n1: another agent writes it; n2: no space left on device",
		},
		"agents have no cache": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) { s.node("n2", true) },
			status: "Failed", conditions: []string{"Ready=False NotAllowed", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=False NotAllowed"},
			kubelet: "0 of 1 nodes have said that their node cache is up to date; the agents of 1 run without --node-cache-dir, which the chart's value nodeCache.enabled sets",
		},
		"some agents have no cache yet": {
			target: toKubelets, edit: func(_ *testing.T, s *situation, _ *claim) {
				s.kubelet("n1", "")
				s.node("n2", true)
			},
			status: "", conditions: []string{"Ready=Unknown Progressing", "SourcesReady=True Ready", "SecretsReady=True Ready", "KubeletReady=Unknown Progressing"},
			kubelet: "1 of 2 nodes have said that their node cache is up to date; the agents of 1 run without --node-cache-dir, which the chart's value nodeCache.enabled sets",
		},
		"nodes without an agent are told where Pods select": {
			target: byPods, edit: func(_ *testing.T, s *situation, _ *claim) {
				s.node("n1", true)
				s.node("n2", false)
			},
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "0 of 0 selected namespaces have the Secret; 1 of 2 nodes have no agent, so that namespaces selected only by Pods there are not seen",
		},
		"nodes without an agent are no matter elsewhere": {
			target: byNone, edit: func(_ *testing.T, s *situation, _ *claim) { s.node("n2", false) },
			status: "Ready", conditions: []string{"Ready=True Ready", "SourcesReady=True Ready", "SecretsReady=True Ready"},
			says: "0 of 0 selected namespaces have the Secret",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				r := resource(t, "a", 0, test.target)
				r.Generation = 5
				c := s.claimOf(t, r, 7)
				c.generation, c.sources = 4, ok
				if test.edit != nil {
					test.edit(t, s, c)
				}
				status := s.statusOf(r, c, s.summarize(c))
				require.Equal(t, test.status, status.Status)
				require.Equal(t, int64(4), status.ObservedGeneration, "that of the spec that was worked on")
				var conditions []string
				for _, condition := range status.Conditions {
					conditions = append(conditions, fmt.Sprintf("%s=%s %s", condition.Type, condition.Status, condition.Reason))
					require.Equal(t, int64(4), condition.ObservedGeneration)
					require.Equal(t, time.Now().Truncate(time.Second), condition.LastTransitionTime.Time)
					require.NotEmpty(t, condition.Message)
				}
				require.Equal(t, test.conditions, conditions)
				message := meta.FindStatusCondition(status.Conditions, v1alpha1.ConditionSecretsReady).Message
				require.Contains(t, message, test.says)
				if test.kubelet != "" {
					require.Equal(t, test.kubelet, meta.FindStatusCondition(status.Conditions, v1alpha1.ConditionKubeletReady).Message)
				}
				require.Equal(t, test.status == "Failed", status.Reason != "")
				require.Contains(t, status.Reason, test.reason)
				require.Equal(t, c.sources, status.SourceSecretStatus)
				require.Zero(t, status.ValiditySeconds)
			})
		})
	}
}

func TestManagedNamespacesAreSortedAndTheirNumberIsLimited(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		for i := range v1alpha1.ManagedNamespacesMax + 5 {
			c.outcomes[fmt.Sprintf("n%04d", i)] = outcome{kind: delivered, counter: 7}
		}
		c.outcomes["failed"] = outcome{kind: failed}
		status := s.statusOf(r, c, s.summarize(c))
		require.Len(t, status.ManagedNamespaces, 1000)
		require.True(t, slices.IsSorted(status.ManagedNamespaces))
		require.Equal(t, "n0000", status.ManagedNamespaces[0])
		require.Equal(t, "n0999", status.ManagedNamespaces[999])
		require.Equal(t, &v1alpha1.NamespaceCounts{Selected: 1006, Delivered: 1005}, status.Namespaces, "the true numbers")
	})
}

func TestConditionsKeepTheTimeOfTheirLastTransition(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		r.Status = s.statusOf(r, c, s.summarize(c))
		first := metav1.NewTime(time.Now().Truncate(time.Second))
		<-time.After(time.Hour)
		c.generation = 2
		c.outcomes["m"] = outcome{kind: delivered, counter: 7}
		same := s.statusOf(r, c, s.summarize(c))
		for _, condition := range same.Conditions {
			require.Equal(t, first, condition.LastTransitionTime)
			require.Equal(t, int64(2), condition.ObservedGeneration)
		}
		c.outcomes["m"] = outcome{kind: foreign, message: "x"}
		changed := s.statusOf(r, c, s.summarize(c))
		for _, condition := range changed.Conditions {
			if condition.Type == v1alpha1.ConditionSourcesReady {
				require.Equal(t, first, condition.LastTransitionTime)
			} else {
				require.Equal(t, first.Add(time.Hour), condition.LastTransitionTime.Time)
			}
		}
	})
}

// A message that the CRD refuses would keep the whole status from being written.
func TestNoMessageIsTooLongForTheAPIServer(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		long := strings.Repeat("é", maxMessage)
		check := func() {
			t.Helper()
			status := s.statusOf(r, c, s.summarize(c))
			for _, condition := range status.Conditions {
				require.LessOrEqual(t, len(condition.Message), maxMessage)
				require.True(t, strings.ToValidUTF8(condition.Message, "") == condition.Message)
			}
		}
		c.outcomes["n"] = outcome{kind: failed, message: long}
		check()
		for range 1000 {
			c.skipped = append(c.skipped, errors.New(`spec.target.namespacesWithPods.labels[0]: "Foo" is not a valid label selector operator`))
		}
		check()
		c.problem = errors.New(long)
		check()
		c.sources = map[string]string{"ns.a": long}
		check()
	})
}

// events returns what is told of a claim as it is now, "<type> <reason> <message>", and has
// the resource carry the status that was told of.
func (s *situation) events(r *v1alpha1.ImagePullSecret, c *claim) []string {
	sum := s.summarize(c)
	status := s.statusOf(r, c, sum)
	s.emit(r, c, status, sum)
	if status.Status == v1alpha1.StatusReady {
		now := metav1.Now()
		status.LastSuccessfulReconciliation = &now
	}
	r.Status = status
	var events []string
	for {
		select {
		case event := <-s.recorder.(*record.FakeRecorder).Events:
			events = append(events, event)
		default:
			return events
		}
	}
}

func TestEventsTellWhatHasChanged(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		edit func(s *situation, c *claim)
		// events are how each begins.
		events []string
	}{
		"all is done for the first time": {func(*situation, *claim) {}, []string{"Normal Reconciled everything"}},
		"in progress":                    {func(_ *situation, c *claim) { c.outcomes["n"] = outcome{kind: pending} }, nil},
		"a source fails": {func(_ *situation, c *claim) { c.sources = map[string]string{"ns.a": "not found"} }, []string{
			"Warning SourceCredentialsError 1 of 1 sources cannot be used: ns.a: not found",
		}},
		"a namespace fails":               {func(_ *situation, c *claim) { c.outcomes["n"] = outcome{kind: failed, message: "no"} }, []string{"Warning SecretReconciliationError 0 of 1"}},
		"a Secret could not be deleted":   {func(s *situation, _ *claim) { s.undeletable[s.key] = undeletable{owner: "uid-a", message: "no"} }, []string{"Warning SecretDeletionError "}},
		"the spec is wrong":               {func(_ *situation, c *claim) { c.problem = errors.New("bad") }, []string{"Warning ReconciliationFailed bad"}},
		"a selector was skipped":          {func(_ *situation, c *claim) { c.skipped = []error{errors.New("bad")} }, []string{"Warning ReconciliationFailed bad"}},
		"the credentials are not written": {func(_ *situation, c *claim) { c.failure = errors.New("bad") }, []string{"Warning ReconciliationFailed the credentials cannot be rendered"}},
		"a source and a namespace fail": {func(_ *situation, c *claim) {
			c.sources, c.outcomes["n"] = map[string]string{"ns.a": "not found"}, outcome{kind: failed, message: "no"}
		}, []string{"Warning SourceCredentialsError ", "Warning SecretReconciliationError "}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				r := resource(t, "a", 0, byName)
				c := s.claimOf(t, r, 7)
				c.sources = map[string]string{"ns.a": "Ok"}
				test.edit(s, c)
				events := s.events(r, c)
				require.Len(t, events, len(test.events), events)
				for i, event := range events {
					require.True(t, strings.HasPrefix(event, test.events[i]), event)
				}
				require.Empty(t, s.events(r, c), "the same again is no news")
				// Nor is it to the next leader, who finds the status.
				c.told = nil
				require.Empty(t, s.events(r, c))
			})
		})
	}
}

func TestACauseIsToldOnceHoweverTheNumbersChange(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		c.outcomes["n"] = outcome{kind: failed, message: "no"}
		require.Len(t, s.events(r, c), 1)
		for i := range 100 {
			c.outcomes[fmt.Sprintf("x%d", i)] = outcome{kind: delivered, counter: 7}
			require.Empty(t, s.events(r, c))
		}
		c.outcomes["m"] = outcome{kind: failed, message: "no"}
		require.Len(t, s.events(r, c), 1, "another namespace fails")
		c.outcomes["m"] = outcome{kind: failed, message: "quota"}
		require.Len(t, s.events(r, c), 1, "it fails for another cause")
		delete(c.outcomes, "m")
		delete(c.outcomes, "n")
		require.Len(t, s.events(r, c), 1, "all is done for the first time")
		c.outcomes["m"] = outcome{kind: failed, message: "quota"}
		require.Len(t, s.events(r, c), 1, "it fails again")
		delete(c.outcomes, "m")
		require.Empty(t, s.events(r, c), "all is done again")
	})
}

func TestANodeThatDoesNotServeItsKubeletIsAnEvent(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, toKubelets)
		c := s.claimOf(t, r, 7)
		s.kubelet("n1", "no space left on device")
		events := s.events(r, c)
		require.Len(t, events, 1)
		require.Contains(t, events[0], "Warning KubeletError 0 of 1 nodes have said that their node cache is up to date; not n1: no space left on device")
		s.kubelet("n2", "")
		require.Empty(t, s.events(r, c), "the same, of more nodes")
	})
}

// What a report says of its node's cache is in the status of the resources that kubelets are served, and of no others.
func TestStatusFollowsTheNodeCaches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		term.claimOf(t, resource(t, "kubelets", 0, toKubelets), 1)
		term.claimOf(t, resource(t, "names", 0, byName), 1)
		key := types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("n1")}
		dirty := func() []string {
			<-time.After(2 * kubeletsDelay)
			synctest.Wait()
			return term.queuedStatuses()
		}
		was := &reportObject{kubelet: &impsync.KubeletReport{Problem: "x"}}
		term.reportChanged(key, nil, was)
		require.Equal(t, []string{"uid-kubelets"}, dirty())
		term.reportChanged(key, was, &reportObject{kubelet: &impsync.KubeletReport{Problem: "x"}})
		require.Empty(t, dirty())
		term.reportChanged(key, was, &reportObject{kubelet: &impsync.KubeletReport{}})
		require.Equal(t, []string{"uid-kubelets"}, dirty())
	})
}

// gaugesOf returns the metrics as "<name>{<label values>}".
func gaugesOf(t *testing.T, registry prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	require.NoError(t, err)
	values := map[string]float64{}
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			var labels []string
			for _, label := range metric.GetLabel() {
				labels = append(labels, label.GetValue())
			}
			values[family.GetName()+"{"+strings.Join(labels, ",")+"}"] = metric.GetGauge().GetValue()
		}
	}
	return values
}

func TestMetricsOfAResource(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		registry := s.config.Registry.(*prometheus.Registry)
		counts := v1alpha1.NamespaceCounts{Selected: 3, Delivered: 2, Excluded: 1}
		s.exportMetrics("a", summary{counts: counts}, v1alpha1.ImagePullSecretStatus{SourceSecretStatus: map[string]string{"ns.a": "Ok", "ns.b": "not found"}})
		s.exportMetrics("b", summary{}, v1alpha1.ImagePullSecretStatus{SourceSecretStatus: map[string]string{"ns.a": "Ok"}})
		want := map[string]float64{
			"imps_leader{}": 0, "imps_nodes_without_agent{}": 0,
			"imps_namespaces{a,selected}": 3, "imps_namespaces{a,delivered}": 2, "imps_namespaces{a,excluded}": 1,
			"imps_namespaces{b,selected}": 0, "imps_namespaces{b,delivered}": 0, "imps_namespaces{b,excluded}": 0,
			"imps_source_ok{a,ns.a}": 1, "imps_source_ok{a,ns.b}": 0, "imps_source_ok{b,ns.a}": 1,
		}
		require.Equal(t, want, gaugesOf(t, registry))

		s.exportMetrics("a", summary{counts: counts}, v1alpha1.ImagePullSecretStatus{SourceSecretStatus: map[string]string{"ns.b": "Ok"}})
		delete(want, "imps_source_ok{a,ns.a}")
		want["imps_source_ok{a,ns.b}"] = 1
		require.Equal(t, want, gaugesOf(t, registry), "a source that is no longer listed is gone")

		s.metrics.forget("a")
		for name := range want {
			if strings.Contains(name, "{a,") {
				delete(want, name)
			}
		}
		require.Equal(t, want, gaugesOf(t, registry))
		s.metrics.withoutAgent.Set(3)
		s.metrics.reset()
		require.Equal(t, map[string]float64{"imps_leader{}": 0, "imps_nodes_without_agent{}": 0}, gaugesOf(t, registry))
	})
}

func TestStatusIsNotWrittenWhereNothingHasChanged(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		r.Status = s.statusOf(r, c, s.summarize(c))
		require.NoError(t, s.reconcileStatus(t.Context(), "uid-a"))
		require.Equal(t, uint64(7), c.reported)
		require.Zero(t, c.statusWritten)
		require.Empty(t, s.server().asked())

		// A rotation changes nothing in it but the time of the last success.
		c.reported = 6
		require.Error(t, s.reconcileStatus(t.Context(), "uid-a"), "it is written, and the server is away")
		c.reported = 7
		c.outcomes["n"] = outcome{kind: failed, message: "no"}
		s.server().asked()
		require.NoError(t, s.reconcileStatus(t.Context(), "uid-a"))
		require.Empty(t, s.server().asked(), "not so soon: also what fails is paced")
		<-time.After(statusInterval)
		require.Error(t, s.reconcileStatus(t.Context(), "uid-a"))
	})
}

func TestStatusIsNotWrittenBeforeEverythingWasRead(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		c.unread = true
		require.NoError(t, s.reconcileStatus(t.Context(), "uid-a"))
		require.NoError(t, s.reconcileStatus(t.Context(), "unknown"))
		require.Empty(t, s.server().asked())
	})
}

func TestStatusIsWrittenAtMostOnceASecond(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		c.statusWritten = time.Now()
		<-time.After(statusInterval / 4)
		require.NoError(t, s.reconcileStatus(t.Context(), "uid-a"), "not yet")
		<-time.After(statusInterval/4*3 - 1)
		synctest.Wait()
		require.Empty(t, s.queuedStatuses())
		<-time.After(2)
		synctest.Wait()
		require.Equal(t, []string{"uid-a"}, s.queuedStatuses())
		require.Empty(t, s.server().asked())
		require.Error(t, s.reconcileStatus(t.Context(), "uid-a"), "now it is written, and the server is away")
		require.Equal(t, []string{"PATCH /apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/a/status"}, s.server().asked())
	})
}

func TestManyChangesOfAStatusAreOneLook(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		for range 100 {
			s.statusDirty("uid-a")
			s.statusDirty(types.UID("uid-b"))
		}
		require.Empty(t, s.queuedStatuses())
		<-time.After(statusDelay + 1)
		synctest.Wait()
		require.Equal(t, []string{"uid-a", "uid-b"}, s.queuedStatuses())
	})
}
